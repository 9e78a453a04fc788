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

export function fromHash(hash) {
  const read = { ...defaults };
  for (const [key, text] of new URLSearchParams(hash.replace(/^#/, ""))) {
    if (!(key in defaults)) continue;
    const plain = defaults[key];
    if (typeof plain === "number" || plain === null) {
      const number = Number(text);
      if (Number.isFinite(number)) read[key] = number;
    } else {
      read[key] = text;
    }
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
