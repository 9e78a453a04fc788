// What the page shows, and how it is kept in the address so that a link restores it.

export const defaults = {
  y: null, x: null, zoom: null,            // centre in level-0 px; screen px per image px
  source: 0, label: 0, mode: "fill", opacity: 50,
  hidden: "", colors: "",                  // "0,3"; "1:ff0000,2:00ff00"
  channels: "",                            // "0:0:255:ff0000:1,…" (last: shown)
  brightness: 100, contrast: 100,
  heat: 0, heatclass: 1, heatopacity: 70,  // heatclass: class id
  compare: "off", with: "", swipe: 50,     // with: "source.label"
  units: 0, tiles: 0, state: 0, certificate: 0, scale: 1, navigator: 1, panel: 1,
};

const between = (least, most) => (value) => value >= least && value <= most;
const whole = (value) => Number.isInteger(value) && value >= 0;
const like = (pattern) => (value) => pattern.test(value);
const number = "-?[\\d.]+(?:e[+-]?\\d+)?";

// What a link may say; a part that a hand or a mail has spoilt is passed over.
const allowed = {
  y: between(-1e9, 1e9), x: between(-1e9, 1e9), zoom: between(1e-9, 1e9), source: whole, label: whole,
  mode: like(/^(fill|outline|off)$/), compare: like(/^(off|swipe|side)$/),
  colors: like(/^(\d+:[0-9a-f]{6}(,|$))*$/i),
  channels: like(new RegExp(`^(\\d+:${number}:${number}:[0-9a-f]{6}:[01](,|$))*$`, "i")),
  opacity: between(0, 100), heatopacity: between(0, 100), swipe: between(2, 98),
  brightness: between(40, 200), contrast: between(40, 250),
};

export function fromHash(hash) {
  const read = { ...defaults };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!Object.hasOwn(defaults, key)) continue;
    const plain = defaults[key], numeric = typeof plain === "number" || plain === null;
    const value = numeric ? Number(text) : text;
    if ((!numeric || Number.isFinite(value)) && (allowed[key]?.(value) ?? true)) read[key] = value;
  }
  return read;
}

export function toHash(settings) {
  const parts = new URLSearchParams();
  for (const [key, plain] of Object.entries(defaults)) {
    const value = settings[key];
    if (value === plain || value === null || value === undefined) continue;
    parts.set(key, typeof value === "number" ? String(Math.round(value * 1e4) / 1e4) : value);
  }
  return parts.toString();
}

export function hex([red, green, blue]) {
  return "#" + [red, green, blue].map((part) => part.toString(16).padStart(2, "0")).join("");
}

export function bytes(color) {
  return [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
}
