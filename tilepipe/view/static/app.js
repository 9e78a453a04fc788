// The page: settings in the address, panes, masks, the running job, keys.

import { Heat } from "./heat.js";
import { LabelLayer } from "./labels.js";
import { Pane, drawMarks, scaleBar } from "./pane.js";
import { FIRST_CHANNELS, Panel, say, windowText } from "./panel.js";
import { bytes, fromHash, toHash } from "./settings.js";

const $ = (id) => document.getElementById(id);

class App {
  constructor() {
    this.settings = fromHash(location.hash);
    this.layers = new Map();
    this.seq = 0;
    this.progress = null;
    this.classes = [];
    this.cursor = null;
    this.found = null; // the object that n or p went to
    this.pointer = null;
  }

  async start() {
    this.sources = await this.ask("api/describe");
    this.settings.source = Math.min(this.settings.source, this.sources.length - 1);
    this.settings.label = Math.max(0, Math.min(this.settings.label, this.source.labels.length - 1));
    this.heat = new Heat(this);
    this.panel = new Panel(this);
    this.paneA = new Pane($("pane-a"), this);
    window.tilepipe = this; // for the tests and the curious
    this.selectSource(true);
    this.bind();
    this.poll();
  }

  get source() { return this.sources[this.settings.source]; }
  get label() { return this.source.labels[this.settings.label]; }

  async ask(path) {
    const response = await fetch(path);
    if (!response.ok) throw new Error(`${path}: ${response.status}`);
    return response.json();
  }

  // A label's tiles, loaded once per label and description.
  layer(sourceIndex, labelIndex) {
    const source = this.sources[sourceIndex], info = source?.labels[labelIndex];
    if (!info) return null;
    const key = `${sourceIndex}.${labelIndex}.${source.generation}`;
    if (!this.layers.has(key)) {
      this.layers.set(key, new LabelLayer(sourceIndex, labelIndex, info, source.tile_px, () => this.redraw()));
      this.restyle();
    }
    return this.layers.get(key);
  }

  selectSource(first) {
    const place = first ? { ...this.settings } : null;
    this.paneA.show(this.source, this.settings.source, this.imageQuery(this.settings.source), () => {
      if (place && place.y !== null && place.x !== null) this.paneA.goTo({ y: place.y, x: place.x, zoom: place.zoom || 1 }, true);
      document.body.dataset.ready = "1";
      this.setCompare();
    });
    document.title = `${this.source.name} · tilepipe`;
    this.selectLabel();
  }

  selectLabel() {
    this.cursor = this.found = null;
    $("object-note").textContent = "";
    this.classes = (this.label?.classes || []).map((one) => ({ ...one }));
    const hidden = new Set(this.settings.hidden.split(",").filter(Boolean).map(Number));
    if (this.settings.hidden) for (const one of this.classes) one.shown = !hidden.has(one.value);
    for (const part of this.settings.colors.split(",").filter(Boolean)) {
      const [value, color] = part.split(":"), one = this.classes.find((c) => c.value === Number(value));
      if (one && /^[0-9a-f]{6}$/i.test(color)) one.color = bytes("#" + color);
    }
    this.panel.build();
    this.restyle();
    this.layer(this.settings.source, this.settings.label);
    this.redraw();
  }

  restyle() {
    for (const layer of this.layers.values()) {
      const own = layer.sourceIndex === this.settings.source && layer.labelIndex === this.settings.label;
      // The second mask follows the first one's classes where they have the same name.
      const classes = own ? this.classes : layer.info.classes.map((one) => ({ ...one, ...pick(this.classes.find((c) => c.name === one.name)) }));
      layer.setStyle(classes, this.settings.mode === "outline" ? "outline" : "fill");
    }
    this.redraw();
  }

  classesChanged() {
    const described = this.label?.classes || [];
    const hidden = this.classes.filter((one) => !one.shown).map((one) => one.value);
    const usual = described.filter((one) => !one.shown).map((one) => one.value);
    this.cursor = null; // it counts the objects of the classes that were shown
    this.settings.hidden = String(hidden) === String(usual) ? "" : (hidden.join(",") || "none");
    this.settings.colors = this.classes.filter((one, index) => String(one.color) !== String(described[index].color))
      .map((one) => `${one.value}:${one.color.map((part) => part.toString(16).padStart(2, "0")).join("")}`).join(",");
    this.restyle();
    this.save();
  }

  // --- image -----------------------------------------------------------------------------------
  // What the address of a store's tiles says besides their place: the windows of its channels, and
  // how much of it was written, since tiles are kept by their address.
  imageQuery(at) {
    const parts = new URLSearchParams(), { channels } = this.sources[at], seq = this.seqOf(at);
    if (channels.length) parts.set("c", (at === this.settings.source ? this.panel.channelWindows() : usualWindows(channels)).join(","));
    if (seq) parts.set("at", seq);
    return parts.size ? `?${parts}` : "";
  }

  // Show a store's image anew, wherever it is shown.
  showImage(at) {
    if (at === this.settings.source) this.paneA.show(this.source, at, this.imageQuery(at));
    if (!$("pane-b").hidden && this.compareTarget()?.sourceIndex === at) this.paneB.show(this.sources[at], at, this.imageQuery(at));
  }

  // Ask for the windows that suit what there is of an image by now.
  async askChannels(at) {
    const source = this.sources[at], started = performance.now();
    source.askedAt = Infinity;
    source.channels = await this.ask(`api/channels?source=${at}`).finally(() => {
      // What takes long is asked for more seldom.
      source.askedAt = performance.now() + Math.max(2000, 10 * (performance.now() - started));
    });
  }

  // While an image is copied its windows follow what is there, until somebody chooses one.
  async followChannels(at) {
    const source = this.sources[at];
    if (!source.channels.length || performance.now() < (source.askedAt || 0)) return;
    await this.askChannels(at);
    if (at === this.settings.source && !this.settings.channels) this.panel.buildChannels();
  }

  channelsChanged() {
    clearTimeout(this.channelTimer);
    this.channelTimer = setTimeout(() => {
      this.showImage(this.settings.source);
      this.save();
    }, 120);
  }

  // --- comparing -------------------------------------------------------------------------------
  compareTarget() {
    const [sourceIndex, labelIndex] = (this.settings.with || "").split(".").map(Number);
    const source = this.sources[sourceIndex];
    if (this.settings.compare === "off" || !source || !source.labels[labelIndex]) return null;
    return { sourceIndex, labelIndex, source, info: source.labels[labelIndex] };
  }

  setCompare() {
    const target = this.compareTarget(), side = Boolean(target) && this.settings.compare === "side";
    const swipe = Boolean(target) && this.settings.compare === "swipe";
    $("panes").classList.toggle("side", side);
    $("pane-b").hidden = !side;
    $("swipe").hidden = !swipe;
    for (const [id, text] of [["chip-a", this.label?.name], ["chip-b", target?.info.name]]) {
      $(id).hidden = !target;
      const several = target && target.sourceIndex !== this.settings.source;
      $(id).textContent = several ? `${id === "chip-a" ? this.source.name : target.source.name} · ${text}` : text || "";
    }
    if (side) {
      if (!this.paneB) this.paneB = new Pane($("pane-b"), this);
      this.paneB.show(target.source, target.sourceIndex, this.imageQuery(target.sourceIndex), () => { this.syncing = false; this.moved(this.paneA); });
    }
    this.placeSwipe();
    this.panel.showNavigator();
    this.settled(this.paneA);
    this.redraw();
  }

  placeSwipe() {
    $("swipe").style.left = `${this.settings.swipe}%`;
    $("swipe").setAttribute("aria-valuenow", Math.round(this.settings.swipe));
  }

  // --- drawing ---------------------------------------------------------------------------------
  paint(pane, context, view, visible) {
    const opacity = this.settings.mode === "off" ? 0 : this.settings.opacity / 100, target = this.compareTarget();
    const mine = this.layer(this.settings.source, this.settings.label);
    const other = target ? this.layer(target.sourceIndex, target.labelIndex) : null;
    const strong = this.settings.mode === "outline" ? Math.min(1, opacity * 2) : opacity;
    const draw = (layer, box) => {
      if (!layer) return;
      this.heat.draw(context, view, box, layer.sourceIndex, layer.labelIndex);
      if (strong > 0) layer.draw(context, view, box, strong);
    };
    if (pane === this.paneB) draw(other, visible);
    else if (other && this.settings.compare === "swipe") {
      const at = view.width * this.settings.swipe / 100;
      const split = (at - view.left) / view.zoom;
      clip(context, 0, at, view, () => draw(mine, { ...visible, x1: Math.min(visible.x1, split) }));
      clip(context, at, view.width, view, () => draw(other, { ...visible, x0: Math.max(visible.x0, split) }));
    } else draw(mine, visible);
    drawMarks(context, view, visible, this.marks());
    if (this.found) {
      const [y0, x0, y1, x1] = this.found.box;
      drawMarks(context, view, visible, { fills: [], boxes: [{ box: [y0 - 2, x0 - 2, y1 + 2, x1 + 2], color: "#ffd23f" }] });
    }
  }

  marks() {
    const { settings } = this, record = this.label?.record || {}, plan = record.plan || {};
    const factor = this.label?.levels[0].downsample || 1;
    const marks = { fills: [], boxes: [], unitStep: 0, tileStep: 0 };
    if (settings.units && this.label) marks.unitStep = this.label.unit_px * factor;
    if (settings.tiles && plan.core_px) marks.tileStep = plan.core_px * factor;
    const state = this.progress?.labels[settings.label];
    if (settings.state && state) {
      const side = this.label.unit_px * factor, failed = new Set(state.failed.map(String));
      const done = state.done_units && new Set(state.done_units.map(String));
      for (let iy = 0; iy < state.shape[0]; iy++) for (let ix = 0; ix < state.shape[1]; ix++) {
        const key = `${iy},${ix}`;
        const color = failed.has(key) ? "rgba(239, 90, 70, .45)" : !done || done.has(key) ? "rgba(54, 181, 162, .28)" : "rgba(240, 180, 41, .28)";
        marks.fills.push({ box: [iy * side, ix * side, Math.min((iy + 1) * side, this.source.extent[0]), Math.min((ix + 1) * side, this.source.extent[1])], color });
      }
    }
    if (settings.certificate) {
      for (const one of certificateBoxes(record.verified)) marks.boxes.push({ box: one.box.map((part) => part * factor), color: one.good ? "#36d6a8" : "#ef5a46" });
    }
    return marks;
  }

  drawn(pane, view) {
    if (pane !== this.paneA) return;
    const { text, good } = this.panel.certificate();
    $("certificate").hidden = !this.settings.certificate || !this.label;
    $("certificate").textContent = text;
    $("certificate").dataset.good = good;
    const bar = scaleBar(view.zoom, this.source.mpp);
    $("scalebar").querySelector("i").style.width = `${bar.px}px`;
    $("scalebar").querySelector("span").textContent = bar.text;
    $("scalebar").hidden = !this.settings.scale;
    $("scalebar").setAttribute("aria-label", `Scale bar: ${bar.text}`);
    $("magnification").textContent = magnification(view.zoom, this.source.mpp);
  }

  redraw() {
    this.paneA?.redraw();
    if (this.paneB && !$("pane-b").hidden) this.paneB.redraw();
  }

  // --- moving ----------------------------------------------------------------------------------
  moved(pane) {
    const other = pane === this.paneA ? this.paneB : this.paneA;
    if (!this.syncing && other && !$("pane-b").hidden && other.ready && pane.ready) {
      this.syncing = true;
      const { y, x, zoom } = pane.place(true);
      other.follow({ y, x, zoom });
      this.syncing = false;
    }
  }

  settled(pane) {
    if (pane !== this.paneA || !pane.ready) return;
    Object.assign(this.settings, pane.place());
    this.save();
  }

  save() {
    clearTimeout(this.saveTimer);
    this.saveTimer = setTimeout(() => history.replaceState(null, "", "#" + toHash(this.settings)), 80);
  }

  goTo(y, x, zoom) {
    this.paneA.goTo({ y, x, zoom: zoom || Math.max(this.paneA.place().zoom, 0.5) });
  }

  async stepObject(direction) {
    if (!this.label) return;
    const { source, label } = this.settings, { y, x } = this.paneA.place();
    const note = $("object-note");
    const shown = this.classes.filter((one) => one.shown && one.value).map((one) => one.value);
    if (!shown.length && !this.label.instances) { note.textContent = "Show a class first."; return; }
    let where = this.cursor ? `&region=${this.cursor[0]}&place=${this.cursor[1]}` : `&y=${Math.max(0, Math.floor(y))}&x=${Math.max(0, Math.floor(x))}`;
    note.textContent = "Looking…";
    for (let calls = 0; calls < 500; calls++) {
      const answer = await this.ask(`api/object?source=${source}&label=${label}&direction=${direction}&classes=${shown.join(",")}${where}`);
      this.cursor = answer.cursor;
      where = `&region=${Math.max(0, this.cursor[0])}&place=${this.cursor[1]}`;
      if (answer.found) {
        this.found = answer;
        const [y0, x0, y1, x1] = answer.box, size = Math.max(y1 - y0, x1 - x0, 24);
        const view = this.paneA.view(), zoom = Math.min(4, Math.min(view.width, view.height) / (size * 3));
        this.goTo(answer.y, answer.x, Math.max(zoom, Math.min(view.zoom, 4)));
        note.textContent = `${answer.class}, ${answer.whole ? "" : "at least "}${area(answer.area_px, this.source.mpp)}, at ${Math.round(answer.y)}, ${Math.round(answer.x)}`;
        this.redraw();
        return;
      }
      if (answer.found === false) break;
    }
    this.cursor = null;
    note.textContent = "No further object of the classes shown.";
  }

  // --- reading the pixel under the pointer -----------------------------------------------------
  point(pane, event) {
    const rect = pane.element.getBoundingClientRect();
    const at = pane.toImage({ x: event.clientX - rect.left, y: event.clientY - rect.top });
    const y = Math.floor(at.y), x = Math.floor(at.x), [height, width] = this.source.extent;
    const where = $("where"), what = $("what");
    if (y < 0 || x < 0 || y >= height || x >= width) { where.textContent = what.textContent = ""; this.pointer = null; return; }
    this.pointer = { y, x };
    const mpp = this.source.mpp;
    where.textContent = `y ${y}, x ${x} px` + (mpp ? `  (${(y * mpp[0]).toFixed(1)}, ${(x * mpp[1]).toFixed(1)} µm)` : "");
    clearTimeout(this.pixelTimer);
    this.pixelTimer = setTimeout(() => this.readPixel(y, x), 70);
  }

  async readPixel(y, x) {
    const answer = await this.ask(`api/pixel?source=${this.settings.source}&y=${y}&x=${x}`).catch(() => null);
    if (!answer || !this.pointer || this.pointer.y !== y || this.pointer.x !== x) return;
    const what = $("what"), readout = $("readout"), mine = answer.labels[this.settings.label];
    what.textContent = "";
    if (mine) {
      const one = this.classes.find((c) => c.value === mine.value);
      if (one) { const swatch = document.createElement("i"); swatch.style.background = `rgb(${one.color.join(",")})`; what.append(swatch); }
      what.append(`${mine.class} (${mine.value})`);
    }
    const chance = this.heat.told(mine);
    if (chance) what.append(` · ${chance.text}`);
    const values = answer.image.map((one) => (one === null ? "no number" : Number.isInteger(one) ? one : Number(one).toPrecision(4)));
    if (values.length) what.append(`${mine ? " · " : ""}${this.source.rgb ? "RGB " : ""}${values.slice(0, 6).join(" ")}`);
    Object.assign(readout.dataset, { y, x, value: mine ? mine.value : "", probability: chance ? chance.byte : "", image: answer.image.join(",") });
  }

  // --- a running job ---------------------------------------------------------------------------
  // The stores on the screen: the second mask may be another one's, and just be written, too.
  get onScreen() { return [...new Set([this.settings.source, this.compareTarget()?.sourceIndex ?? this.settings.source])]; }

  async poll() {
    let pause = 3000;
    try {
      for (const at of this.onScreen) if (!await this.look(at)) pause = 700;
      this.lost = false;
    } catch {
      if (!this.lost) say("tilepipe view has ended or cannot be reached; waiting for it.");
      this.lost = true;
      pause = 3000;
    }
    setTimeout(() => this.poll(), document.hidden ? 4000 : pause);
  }

  // See what a job has written of a store since; whether all of it is there.
  async look(at) {
    const answer = await this.ask(`api/progress?source=${at}&since=${this.seqOf(at)}`);
    this.setSeq(at, answer.seq);
    if (at === this.settings.source) this.progress = answer;
    if (answer.generation !== this.sources[at].generation) await this.describeAgain();
    else await this.apply(at, answer.changed);
    if (at === this.settings.source) {
      this.panel.showProgress(answer);
      if (this.settings.state) this.redraw();
    }
    return answer.complete;
  }

  seqOf(index) { return this.seqs?.get(index) ?? this.sources[index].seq; }
  setSeq(index, seq) { (this.seqs ||= new Map()).set(index, Math.max(seq, this.seqOf(index))); }

  async apply(at, changed) {
    let image = false;
    for (const [, name, level, y0, x0, y1, x1] of changed) {
      if (name === "image") { image = true; continue; }
      for (const layer of this.layers.values()) {
        if (layer.sourceIndex === at && layer.labelIndex === Number(name)) layer.invalidate(level, [y0, x0, y1, x1]);
      }
      this.heat.invalidate(at, Number(name), level, [y0, x0, y1, x1]);
    }
    if (image) { await this.followChannels(at); this.showImage(at); }
    if (changed.length) this.redraw();
  }

  async describeAgain() {
    const before = this.sources, was = this.source, name = this.label?.name, other = this.compareTarget();
    this.sources = await this.ask("api/describe");
    const anew = (at) => this.sources[at].generation !== before[at].generation;
    for (const at of before.keys()) if (anew(at)) this.seqs?.delete(at);
    // Other labels may have come before them: they are found again by name.
    const find = (at, wanted) => this.sources[at].labels.findIndex((one) => one.name === wanted);
    this.settings.label = Math.max(0, find(this.settings.source, name));
    if (other) this.settings.with = `${other.sourceIndex}.${find(other.sourceIndex, other.info.name)}`;
    for (const key of this.layers.keys()) if (!this.sources.some((source, at) => key.startsWith(`${at}.`) && key.endsWith(`.${source.generation}`))) this.layers.delete(key);
    this.heat.forget();
    if (anew(this.settings.source)) this.panel.buildChannels();
    if (this.source.has_image !== was.has_image || String(this.source.extent) !== String(was.extent)) this.selectSource(false);
    else this.selectLabel();
    this.panel.fillSelects();
    if (String(this.source.channels.map((one) => one.window)) !== String(was.channels.map((one) => one.window))) this.showImage(this.settings.source);
    this.setCompare();
  }

  // --- hands -----------------------------------------------------------------------------------
  bind() {
    for (const [id, name] of [["pane-a", "paneA"], ["pane-b", "paneB"]]) {
      $(id).addEventListener("pointermove", (event) => this[name] && this.point(this[name], event));
      $(id).addEventListener("pointerdown", (event) => this[name] && this.point(this[name], event));
    }
    const swipe = $("swipe");
    const set = (percent) => { this.settings.swipe = Math.min(98, Math.max(2, percent)); this.placeSwipe(); this.redraw(); this.save(); };
    swipe.addEventListener("pointerdown", (event) => { swipe.setPointerCapture(event.pointerId); event.preventDefault(); swipe.focus(); });
    swipe.addEventListener("pointermove", (event) => {
      if (!swipe.hasPointerCapture(event.pointerId)) return;
      const rect = $("panes").getBoundingClientRect();
      set((event.clientX - rect.left) / rect.width * 100);
    });
    swipe.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -2, ArrowRight: 2 }[event.key];
      if (step) { set(this.settings.swipe + step); event.stopPropagation(); event.preventDefault(); }
    });
    window.addEventListener("hashchange", () => {
      const read = fromHash(location.hash);
      if (toHash(read) === toHash(this.settings)) return;
      this.settings = read;
      this.settings.source = Math.min(read.source, this.sources.length - 1);
      this.settings.label = Math.max(0, Math.min(read.label, this.source.labels.length - 1));
      this.panel.buildChannels();
      this.panel.fillSelects();
      this.panel.showPanel();
      this.selectSource(true);
    });
  }

  zoomBy(factor) { this.paneA.viewer.viewport.zoomBy(factor); this.paneA.viewer.viewport.applyConstraints(); }
  pan(dx, dy) { const b = this.paneA.viewer.viewport.getBounds(); this.paneA.viewer.viewport.panBy(new OpenSeadragon.Point(dx * b.width, dy * b.height)); this.paneA.viewer.viewport.applyConstraints(); }
  fit() { this.paneA.viewer.viewport.goHome(); }
  full() { const { y, x } = this.paneA.place(); this.goTo(y, x, 1); }

  async share() {
    Object.assign(this.settings, this.paneA.place());
    history.replaceState(null, "", "#" + toHash(this.settings));
    try { await navigator.clipboard.writeText(location.href); say("Link copied. It works on this computer while this view runs."); }
    catch { say("The link is in the address bar."); }
  }
}

// The windows in which channels are shown that nobody has chosen any for.
function usualWindows(channels) {
  return channels.slice(0, FIRST_CHANNELS).map((one, index) => windowText(index, ...one.window, one.color));
}

function pick(one) { return one ? { color: one.color, shown: one.shown } : {}; }

function clip(context, from, to, view, draw) {
  context.save();
  context.beginPath();
  context.rect(from, 0, Math.max(0, to - from), view.height);
  context.clip();
  draw();
  context.restore();
}

function magnification(zoom, mpp) {
  const percent = zoom * 100;
  const text = `${percent >= 10 ? Math.round(percent) : percent.toPrecision(2)} %`;
  // A 10x objective is about 1 µm per pixel.
  return mpp ? `${+(10 * zoom / mpp[1]).toPrecision(2)}× · ${text}` : text;
}

function area(px, mpp) {
  if (!mpp) return `${px} px`;
  const um2 = px * mpp[0] * mpp[1];
  return um2 >= 1e4 ? `${(um2 / 1e6).toPrecision(3)} mm²` : `${um2.toPrecision(3)} µm²`;
}

// Places the certificate looked at: anything in it with a box of four numbers.
export function certificateBoxes(certificate) {
  const found = [];
  const seek = (value, good) => {
    if (Array.isArray(value)) value.forEach((one) => seek(one, good));
    else if (value && typeof value === "object") {
      const wrong = value.differing ?? value.wrong_px ?? value.differing_px ?? 0;
      const here = good && !(wrong > 0) && value.equal !== false && value.ok !== false;
      const box = value.box || (("y0" in value && "x1" in value) ? [value.y0, value.x0, value.y1, value.x1] : null);
      if (Array.isArray(box) && box.length === 4 && box.every(Number.isFinite)) found.push({ box, good: here });
      else if (box && typeof box === "object" && Number.isFinite(box.y0)) found.push({ box: [box.y0, box.x0, box.y1, box.x1], good: here });
      for (const [key, inner] of Object.entries(value)) if (key !== "box") seek(inner, here);
    }
  };
  seek(certificate, true);
  return found;
}

new App().start().catch((error) => say(`This view cannot be shown: ${error.message}`));
