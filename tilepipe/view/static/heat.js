// The heat map: a class's probabilities, bytes from the server, coloured here.

import { LabelLayer } from "./labels.js";

const $ = (id) => document.getElementById(id);

// Viridis at ten even steps: as light as the value is high, also without colours.
const VIRIDIS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43], [253, 231, 37],
];
const CLEAR_BELOW = 32; // of 255: what is improbable fades, so that the slide stays visible

export function heatColor(value) {
  const at = value / 255 * (VIRIDIS.length - 1), low = Math.min(VIRIDIS.length - 2, Math.floor(at));
  return VIRIDIS[low].map((part, index) => Math.round(part + (VIRIDIS[low + 1][index] - part) * (at - low)));
}

// Colours of the bytes as ABGR.
export function heatTable() {
  const table = new Uint32Array(256);
  for (let value = 1; value < 256; value++) {
    const [red, green, blue] = heatColor(value), alpha = Math.round(255 * Math.min(1, value / CLEAR_BELOW));
    table[value] = (alpha << 24 | blue << 16 | green << 8 | red) >>> 0;
  }
  return table;
}

export function percent(byte) {
  return `${(byte / 2.55).toFixed(byte > 0 && byte < 255 ? 1 : 0)} %`;
}

export class Heat {
  constructor(app) {
    this.app = app;
    this.layers = new Map();
    this.style = { version: 0, lut: heatTable(), mode: "fill" };
    const legend = $("heat-legend"), context = legend.getContext("2d");
    for (let value = 0; value < 256; value++) {
      context.fillStyle = `rgb(${heatColor(value).join(",")})`;
      context.fillRect(value, 0, 1, legend.height);
    }
    $("heat").addEventListener("change", (event) => this.set({ heat: event.target.checked ? 1 : 0 }));
    $("heat-class").addEventListener("change", (event) => this.set({ heatclass: Number(event.target.value) }));
    $("heat-opacity").addEventListener("input", (event) => this.set({ heatopacity: Number(event.target.value) }));
  }

  set(changes) {
    Object.assign(this.app.settings, changes);
    this.build();
    this.app.redraw();
    this.app.save();
  }

  // The controls, as the label and the settings have it.
  build() {
    const { settings, label } = this.app, channels = label?.probabilities || [];
    $("heat-section").hidden = !channels.length;
    if (!channels.length) return;
    if (!channels.some((one) => one.value === settings.heatclass)) settings.heatclass = channels[0].value;
    $("heat-class").replaceChildren(...channels.map((one) => Object.assign(document.createElement("option"), { value: one.value, textContent: one.name, selected: one.value === settings.heatclass })));
    $("heat").checked = Boolean(settings.heat);
    $("heat-opacity").value = settings.heatopacity;
    $("heat-opacity-value").textContent = `${settings.heatopacity} %`;
    $("heat-rows").hidden = !settings.heat;
  }

  toggle() {
    if (!$("heat-section").hidden) $("heat").click();
  }

  // The class shown of a label: the chosen one, in another label that of the same name.
  channel(info) {
    const own = this.app.label?.probabilities?.find((one) => one.value === this.app.settings.heatclass);
    return (info?.probabilities || []).findIndex((one) => one.name === own?.name);
  }

  layer(sourceIndex, labelIndex) {
    const source = this.app.sources[sourceIndex], info = source?.labels[labelIndex], channel = this.channel(info);
    if (channel < 0) return null;
    const key = `${sourceIndex}.${labelIndex}.${channel}.${source.generation}`;
    if (!this.layers.has(key)) {
      const plain = { ...info, instances: false }, place = `t/${sourceIndex}/probability/${labelIndex}/${channel}`;
      const layer = new LabelLayer(sourceIndex, labelIndex, plain, source.tile_px, () => this.app.redraw(), place);
      layer.style = this.style;
      this.layers.set(key, layer);
    }
    return this.layers.get(key);
  }

  draw(context, view, visible, sourceIndex, labelIndex) {
    const { settings } = this.app;
    if (settings.heat && settings.heatopacity > 0) this.layer(sourceIndex, labelIndex)?.draw(context, view, visible, settings.heatopacity / 100);
  }

  invalidate(sourceIndex, labelIndex, level, box) {
    for (const layer of this.layers.values()) if (layer.sourceIndex === sourceIndex && layer.labelIndex === labelIndex) layer.invalidate(level, box);
  }

  // Layers of a description that is no longer true.
  forget() {
    for (const key of this.layers.keys()) {
      const [source, , , generation] = key.split(".");
      if (String(this.app.sources[source]?.generation) !== generation) this.layers.delete(key);
    }
  }

  // What the readout says of a pixel: class and percent.
  told(pixel) {
    const channel = this.app.settings.heat ? this.channel(this.app.label) : -1;
    const byte = pixel?.probabilities?.[channel];
    return byte === undefined ? null : { byte, text: `${this.app.label.probabilities[channel].name} ${percent(byte)}` };
  }
}
