// The panel, the bar and the keys: every control reads and writes app.settings.

import { bytes, hex } from "./settings.js";

const $ = (id) => document.getElementById(id);

export const FIRST_CHANNELS = 8; // shown until somebody chooses

// How a channel is shown, as the server reads it.
export function windowText(index, low, high, color) {
  return `${index}:${+low.toPrecision(6)}:${+high.toPrecision(6)}:${color}`;
}

let hideToast = 0;
export function say(text) {
  $("toast").textContent = text;
  $("toast").classList.add("shown");
  clearTimeout(hideToast);
  hideToast = setTimeout(() => $("toast").classList.remove("shown"), 3200);
}

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function aria(node, name) { node.setAttribute("aria-label", name); return node; }

const KEYS = [
  ["+ −", "Zoom in, out"], ["← ↑ → ↓", "Move"], ["0", "Whole slide"], ["1", "Full resolution"],
  ["m", "Mask on or off"], ["o", "Outline or fill"], ["[ ]", "Less, more opacity"],
  ["h", "Heat map of the probabilities"],
  ["n p", "Next, previous object"], ["g", "Go to coordinates"],
  ["c", "Compare: off, swipe, side by side"], ["l", "Next label"],
  ["u i r k", "Write units, tiles, unit state, certificate"],
  ["s", "Copy a link to this view"], ["t", "Dark or light"], ["v", "Panel"], ["?", "These shortcuts"],
];

export class Panel {
  constructor(app) {
    this.app = app;
    this.channels = [];
    $("keys").append(...KEYS.flatMap(([keys, text]) => [make("dt", {}, ...keys.split(" ").flatMap((key) => [make("kbd", { textContent: key }), " "])), make("dd", { textContent: text })]));
    let theme = "";
    try { theme = localStorage.getItem("tilepipe-theme") || ""; } catch { /* private windows */ }
    this.setTheme(theme || (matchMedia("(prefers-color-scheme: light)").matches ? "light" : "dark"));
    if (matchMedia("(max-width: 760px)").matches && !location.hash.includes("panel=")) app.settings.panel = 0;
    this.bind();
    this.buildChannels();
    this.fillSelects();
    this.showPanel();
  }

  get settings() { return this.app.settings; }

  setTheme(theme) { document.documentElement.dataset.theme = theme; this.theme = theme; }

  toggleTheme() {
    this.setTheme(this.theme === "dark" ? "light" : "dark");
    try { localStorage.setItem("tilepipe-theme", this.theme); } catch { /* not kept then */ }
  }

  showPanel() {
    $("stage").classList.toggle("closed", !this.settings.panel);
    $("panel-toggle").setAttribute("aria-expanded", String(Boolean(this.settings.panel)));
  }

  togglePanel() { this.settings.panel = this.settings.panel ? 0 : 1; this.showPanel(); this.app.save(); }

  fillSelects() {
    const { app } = this, several = app.sources.length > 1;
    const options = (select, chosen, without = []) => {
      select.replaceChildren(...app.sources.flatMap((source, s) => (source.labels.length ? source.labels : without).map((label, l) =>
        make("option", { value: `${s}.${l}`, textContent: several ? `${source.name} · ${label.name}` : label.name, selected: `${s}.${l}` === chosen }))));
    };
    // Stores without a mask are chosen here, too.
    options($("label-select"), `${this.settings.source}.${this.settings.label}`, [{ name: "no mask" }]);
    const all = app.sources.flatMap((source, s) => source.labels.map((_, l) => `${s}.${l}`));
    const current = `${this.settings.source}.${this.settings.label}`;
    if (!all.includes(this.settings.with) || this.settings.with === current) this.settings.with = all.find((one) => one !== current) || "";
    options($("compare-select"), this.settings.with);
    $("compare-section").hidden = all.length < 2;
    const rows = $("label-select").options.length;
    $("mask-section").hidden = all.length === 0 && rows < 2;
    $("label-row").hidden = rows < 2;
  }

  // Everything that depends on the label or the settings.
  build() {
    const { app, settings } = this, source = app.source;
    $("title").textContent = source.name;
    const [height, width] = source.extent;
    $("subtitle").textContent = `${width.toLocaleString("en")} × ${height.toLocaleString("en")} px${source.mpp ? ` · ${+source.mpp[1].toPrecision(4)} µm/px` : ""}`;
    document.querySelector(`input[name="mode"][value="${settings.mode}"]`)?.click();
    document.querySelector(`input[name="compare"][value="${settings.compare}"]`).checked = true;
    $("opacity").value = settings.opacity;
    $("opacity-value").textContent = `${settings.opacity} %`;
    for (const id of ["brightness", "contrast"]) { $(id).value = settings[id]; $(id).nextElementSibling.textContent = `${settings[id]} %`; }
    for (const id of ["units", "tiles", "state", "certificate", "scale", "navigator"]) $(`layer-${id}`).checked = Boolean(settings[id]);
    this.showNavigator();
    app.heat.build();
    this.buildClasses();
    this.buildFacts();
  }

  buildClasses() {
    const { app } = this;
    $("classes").replaceChildren(...app.classes.map((one) => {
      const box = make("input", { type: "checkbox", checked: one.shown });
      box.addEventListener("change", () => { one.shown = box.checked; app.classesChanged(); });
      const color = aria(make("input", { type: "color", value: hex(one.color) }), `Colour of ${one.name}`);
      color.addEventListener("input", () => { one.color = bytes(color.value); app.classesChanged(); });
      const share = one.share >= 0.0995 ? `${Math.round(one.share * 100)} %` : one.share >= 0.001 ? `${(one.share * 100).toFixed(1)} %` : one.share > 0 ? "< 0.1 %" : "–";
      const item = make("li", {}, make("label", {}, box, make("span", { textContent: one.name, title: one.name })), make("em", { textContent: share, title: "Share of the area, from the overview" }), color);
      item.dataset.value = one.value;
      return item;
    }));
    $("classes-note").textContent = app.label?.instances ? "Each object has a colour of its own." : app.label ? "" : "This store has no mask yet.";
  }

  buildFacts() {
    const { app } = this, record = app.label?.record || {}, rows = [];
    const add = (name, value, kind = "") => { if (value !== undefined && value !== null && value !== "") rows.push(make("dt", { textContent: name }), make("dd", { textContent: String(value), className: kind })); };
    const { plan = {}, model = {}, settings = {} } = record;
    add("Format", `OME-Zarr ${app.source.ome_zarr}, ${app.source.dtype}`);
    add("Network", model.name);
    add("Weights", model.source);
    add("Tiling", plan.mode);
    if (plan.core_px) add("Tile", `${plan.core_px} px, halo ${plan.halo_px} px`);
    add("Write unit", app.label ? `${app.label.unit_px} px` : "");
    add("Precision", settings.precision);
    add("Device", settings.device);
    if (app.label) add("State", record.state);
    if (app.label) { const { text, good } = this.certificate(); add("Certificate", text, good === "yes" ? "good" : good === "no" ? "bad" : ""); }
    $("facts").replaceChildren(...rows);
  }

  // What `tilepipe verify` found, in words.
  certificate() {
    const found = this.app.label?.record?.verified;
    if (!found) return { text: "not verified yet", good: "" };
    const flips = Number(found.flips) || 0, day = String(found.date || "").slice(0, 10);
    const text = found.passed ? `verified ${day}: ${flips} of ${Number(found.sampled_px || 0).toLocaleString("en")} px differ` : `verification failed ${day}: ${flips} px differ`;
    return { text, good: found.passed ? "yes" : "no" };
  }

  // --- channels --------------------------------------------------------------------------------
  buildChannels(reset = false) {
    const source = this.app.source, kept = new Map();
    if (!reset) for (const part of this.settings.channels.split(",").filter(Boolean)) { const [index, low, high, color, shown] = part.split(":"); kept.set(Number(index), { low: Number(low), high: Number(high), color, shown: shown !== "0" }); }
    this.channels = source.channels.map((channel, index) => ({ ...channel, low: channel.window[0], high: channel.window[1], shown: index < FIRST_CHANNELS, ...kept.get(index) }));
    if (reset) this.settings.channels = "";
    $("channels-section").hidden = !this.channels.length;
    $("image-section").hidden = Boolean(this.channels.length) || !source.has_image;
    $("channels").replaceChildren(...this.channels.map((one) => {
      const changed = () => { this.settings.channels = this.channels.map((c, i) => `${windowText(i, c.low, c.high, c.color)}:${c.shown ? 1 : 0}`).join(","); this.app.channelsChanged(); };
      const box = make("input", { type: "checkbox", checked: one.shown });
      box.addEventListener("change", () => { one.shown = box.checked; changed(); });
      const color = aria(make("input", { type: "color", value: `#${one.color}` }), `Colour of ${one.name}`);
      color.addEventListener("input", () => { one.color = color.value.slice(1); changed(); });
      const show = (value) => (value >= 100 || Number.isInteger(value) ? Math.round(value) : +value.toPrecision(3));
      const slider = (key, word) => {
        const output = make("output", { textContent: show(one[key]) });
        const input = aria(make("input", { type: "range", min: one.range[0], max: one.range[1], step: one.range[1] > 10 ? 1 : (one.range[1] - one.range[0]) / 500, value: one[key] }), `${word} of ${one.name}`);
        input.addEventListener("input", () => { one[key] = Number(input.value); if (one.low >= one.high) one.high = one.low + 1e-6; output.textContent = show(one[key]); changed(); });
        return [make("span", { textContent: word === "Black" ? "min" : "max" }), input, output];
      };
      return make("li", {}, make("div", { className: "head" }, make("label", {}, box, make("span", { textContent: one.name })), color), make("div", { className: "range" }, ...slider("low", "Black"), ...slider("high", "White")));
    }));
  }

  channelWindows() {
    return this.channels.map((one, index) => [one, index]).filter(([one]) => one.shown).map(([one, index]) => windowText(index, one.low, one.high, one.color));
  }

  // --- a running job ---------------------------------------------------------------------------
  showProgress(answer) {
    const state = answer.labels[this.settings.label], running = state && (state.state === "running" || (state.done < state.units && state.state !== "done"));
    $("job").hidden = !running && !(state && state.failed.length);
    if (!state) return;
    const percent = state.units ? Math.floor(100 * state.done / state.units) : 0;
    document.querySelector(".meter i").style.width = `${percent}%`;
    document.querySelector(".meter").setAttribute("aria-valuenow", percent);
    $("job-text").textContent = `${state.done} of ${state.units} units${state.failed.length ? `, ${state.failed.length} failed` : ""}`;
  }

  showNavigator() {
    for (const pane of [this.app.paneA, this.app.paneB]) {
      const node = pane?.viewer.navigator?.element;
      const twice = pane === this.app.paneA && !$("pane-b").hidden;
      if (node) node.style.visibility = this.settings.navigator && !twice ? "visible" : "hidden";
    }
  }

  // --- hands -----------------------------------------------------------------------------------
  bind() {
    const { app } = this;
    const on = (id, event, act) => $(id).addEventListener(event, act);
    on("zoom-in", "click", () => app.zoomBy(1.6));
    on("zoom-out", "click", () => app.zoomBy(1 / 1.6));
    on("zoom-fit", "click", () => app.fit());
    on("zoom-full", "click", () => app.full());
    on("share", "click", () => app.share());
    on("theme", "click", () => this.toggleTheme());
    on("help-open", "click", () => $("help").showModal());
    on("panel-toggle", "click", () => this.togglePanel());
    on("label-select", "change", (event) => {
      const [source, label] = event.target.value.split(".").map(Number), other = source !== this.settings.source;
      Object.assign(this.settings, { source, label, hidden: "", colors: "" });
      if (other) { Object.assign(this.settings, { channels: "" }); this.buildChannels(); app.selectSource(false); } else app.selectLabel();
      this.fillSelects();
      app.setCompare();
      app.save();
    });
    on("opacity", "input", (event) => this.setOpacity(Number(event.target.value)));
    for (const radio of document.querySelectorAll('input[name="mode"]')) radio.addEventListener("change", () => { this.settings.mode = radio.value; app.restyle(); app.save(); });
    for (const radio of document.querySelectorAll('input[name="compare"]')) radio.addEventListener("change", () => { this.settings.compare = radio.value; app.setCompare(); app.save(); });
    on("compare-select", "change", (event) => { this.settings.with = event.target.value; app.setCompare(); app.save(); });
    for (const id of ["brightness", "contrast"]) on(id, "input", (event) => this.setImage(id, Number(event.target.value)));
    on("image-reset", "click", () => { for (const id of ["brightness", "contrast"]) { $(id).value = 100; this.setImage(id, 100); } });
    on("channels-auto", "click", async () => { await app.askChannels(app.settings.source).catch(() => {}); this.buildChannels(true); app.channelsChanged(); });
    for (const id of ["units", "tiles", "state", "certificate", "scale", "navigator"]) {
      on(`layer-${id}`, "change", (event) => { this.settings[id] = event.target.checked ? 1 : 0; this.showNavigator(); app.redraw(); app.save(); });
    }
    on("goto", "submit", (event) => {
      event.preventDefault();
      const numbers = ($("goto-text").value.match(/-?\d+(?:\.\d+)?/g) || []).map(Number), [height, width] = app.source.extent;
      if (numbers.length < 2 || numbers.length > 3 || numbers[0] < 0 || numbers[1] < 0 || numbers[0] >= height || numbers[1] >= width || numbers[2] <= 0) { say(`Type y and x in px, for example ${Math.round(height / 2)}, ${Math.round(width / 2)}.`); return; }
      app.goTo(numbers[0], numbers[1], numbers[2] || 1);
    });
    on("next-object", "click", () => app.stepObject("next"));
    on("previous-object", "click", () => app.stepObject("previous"));
    document.addEventListener("keydown", (event) => this.key(event));
  }

  setOpacity(percent) {
    this.settings.opacity = Math.min(100, Math.max(0, percent));
    $("opacity").value = this.settings.opacity;
    $("opacity-value").textContent = `${this.settings.opacity} %`;
    this.app.redraw();
    this.app.save();
  }

  setImage(id, percent) {
    this.settings[id] = percent;
    $(id).nextElementSibling.textContent = `${percent} %`;
    this.app.paneA.filter();
    this.app.paneB?.filter();
    this.app.save();
  }

  pick(name, value) { const radio = document.querySelector(`input[name="${name}"][value="${value}"]`); if (radio && !radio.closest("section").hidden) radio.click(); }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
    const target = event.target, { app, settings } = this;
    const typing = target.matches?.("input:not([type=checkbox]):not([type=radio]), select, textarea");
    if (typing) { if (event.key === "Escape") target.blur(); return; }
    if (event.key.startsWith("Arrow") && target.matches?.("input, [role=slider]")) return;
    const flip = (id) => $(`layer-${id}`).click();
    const acts = {
      "+": () => app.zoomBy(1.6), "=": () => app.zoomBy(1.6), "-": () => app.zoomBy(1 / 1.6), "_": () => app.zoomBy(1 / 1.6),
      "0": () => app.fit(), "1": () => app.full(),
      ArrowLeft: () => app.pan(-0.15, 0), ArrowRight: () => app.pan(0.15, 0), ArrowUp: () => app.pan(0, -0.15), ArrowDown: () => app.pan(0, 0.15),
      m: () => { if (settings.mode !== "off") { this.last = settings.mode; this.pick("mode", "off"); } else this.pick("mode", this.last || "fill"); },
      o: () => this.pick("mode", settings.mode === "outline" ? "fill" : "outline"),
      "[": () => this.setOpacity(settings.opacity - 10), "]": () => this.setOpacity(settings.opacity + 10),
      h: () => app.heat.toggle(),
      n: () => app.stepObject("next"), p: () => app.stepObject("previous"),
      g: () => { if (!settings.panel) this.togglePanel(); $("goto-text").focus(); },
      c: () => this.pick("compare", { off: "swipe", swipe: "side", side: "off" }[settings.compare]),
      l: () => { const select = $("label-select"); if (select.options.length > 1) { select.selectedIndex = (select.selectedIndex + 1) % select.options.length; select.dispatchEvent(new Event("change")); } },
      u: () => flip("units"), i: () => flip("tiles"), r: () => flip("state"), k: () => flip("certificate"),
      s: () => app.share(), t: () => this.toggleTheme(), v: () => this.togglePanel(), "?": () => $("help").showModal(),
    };
    const act = acts[event.key];
    if (act) { event.preventDefault(); act(); }
  }
}
