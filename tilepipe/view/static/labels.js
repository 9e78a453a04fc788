// Label tiles: class ids from the server, coloured here, so that colour, opacity and outline
// change at once without asking the server again.

const TILE_LIMIT = 120;
const CRISP_FROM = 3; // screen px per label px from which outlines are drawn as lines

export class LabelLayer {
  constructor(sourceIndex, labelIndex, info, tilePx, changed, place = `t/${sourceIndex}/label/${labelIndex}`) {
    this.sourceIndex = sourceIndex;
    this.labelIndex = labelIndex;
    this.info = info;
    this.tilePx = tilePx;
    this.changed = changed;
    this.place = place;
    this.tiles = new Map();
    this.loading = 0;
    this.style = { version: 0, lut: new Uint32Array(256), mode: "fill" };
    this.request(info.levels.length - 1, 0, 0);
  }

  setStyle(classes, mode) {
    // Ids that no class is listed for, seen at full resolution only, are grey.
    const lut = new Uint32Array(256).fill(0xff808080, classes.length);
    for (const { value, color, shown } of classes) {
      if (shown && value < 256) lut[value] = 0xff000000 | (color[2] << 16) | (color[1] << 8) | color[0];
    }
    this.style = { version: this.style.version + 1, lut, mode, css: classes };
  }

  // Colour of a class id as ABGR; ids beyond the class list (instances) get a colour of their own.
  colorOf(id) {
    if (!this.info.instances) return this.style.lut[id & 255];
    if (id === 0) return 0;
    const mixed = Math.imul(id, 2654435761) >>> 0;
    return (0xff000000 | (64 + ((mixed >>> 16) % 192)) << 16 | (64 + ((mixed >>> 8) % 192)) << 8 | (64 + (mixed % 192))) >>> 0;
  }

  shapeOf(level) { return this.info.levels[level].shape; }

  tileBox(level, ty, tx) {
    const [height, width] = this.shapeOf(level);
    const y0 = ty * this.tilePx, x0 = tx * this.tilePx;
    return { y0, x0, y1: Math.min(y0 + this.tilePx, height), x1: Math.min(x0 + this.tilePx, width) };
  }

  request(level, ty, tx) {
    const key = `${level}/${ty}_${tx}`;
    let tile = this.tiles.get(key);
    if (!tile) {
      tile = { key, level, ty, tx, ids: null, canvas: null, version: -1, busy: false, stale: true, used: 0, lines: null };
      this.tiles.set(key, tile);
    }
    tile.used = performance.now();
    if (tile.stale && !tile.busy) this.fetchTile(tile);
    return tile;
  }

  async fetchTile(tile) {
    tile.busy = true;
    tile.stale = false;
    this.loading += 1;
    try {
      const response = await fetch(`${this.place}/${tile.key}.bin`);
      if (!response.ok) throw new Error(`tile ${tile.key}: ${response.status}`);
      const buffer = await response.arrayBuffer();
      const { y0, x0, y1, x1 } = this.tileBox(tile.level, tile.ty, tile.tx);
      const [height, width] = this.shapeOf(tile.level);
      // One px more on each inner side, so that outlines do not depend on the tiling.
      tile.pad = { top: y0 > 0 ? 1 : 0, left: x0 > 0 ? 1 : 0, bottom: y1 < height ? 1 : 0, right: x1 < width ? 1 : 0 };
      tile.height = y1 - y0;
      tile.width = x1 - x0;
      tile.stride = tile.width + tile.pad.left + tile.pad.right;
      const wanted = tile.stride * (tile.height + tile.pad.top + tile.pad.bottom);
      const ids = this.info.instances ? new Uint32Array(buffer) : new Uint8Array(buffer);
      if (ids.length !== wanted) throw new Error(`tile ${tile.key}: ${ids.length} ids, not ${wanted}`);
      tile.ids = ids;
      tile.version = -1;
      tile.lines = null;
      tile.failed = 0;
    } catch (error) {
      tile.failed = (tile.failed || 0) + 1;
      if (tile.failed < 4) setTimeout(() => { tile.stale = true; this.changed(); }, 500 * tile.failed);
    } finally {
      tile.busy = false;
      this.loading -= 1;
      this.forget();
      this.changed();
    }
  }

  forget() {
    if (this.tiles.size <= TILE_LIMIT) return;
    const top = this.info.levels.length - 1;
    const old = [...this.tiles.values()].filter((tile) => tile.level !== top && !tile.busy).sort((a, b) => a.used - b.used);
    for (const tile of old.slice(0, this.tiles.size - TILE_LIMIT)) this.tiles.delete(tile.key);
  }

  // A unit of `level` changed: every tile at this level or a coarser one that shows it is asked again.
  invalidate(level, box) {
    for (const tile of this.tiles.values()) {
      if (tile.level < level) continue;
      const factor = 2 ** (tile.level - level), area = this.tileBox(tile.level, tile.ty, tile.tx);
      if (area.y0 * factor < box[2] + factor && area.y1 * factor > box[0] - factor && area.x0 * factor < box[3] + factor && area.x1 * factor > box[1] - factor) tile.stale = true;
    }
  }

  paint(tile) {
    if (!tile.ids || tile.version === this.style.version) return;
    const { ids, stride, height, width, pad } = tile;
    if (!tile.canvas) tile.canvas = document.createElement("canvas");
    tile.canvas.width = width;
    tile.canvas.height = height;
    const context = tile.canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const out = new Uint32Array(image.data.buffer);
    const outline = this.style.mode === "outline", lut = this.style.lut, plain = !this.info.instances;
    const lastRow = height + pad.top + pad.bottom - 1, lastColumn = stride - 1;
    let at = 0;
    for (let y = 0; y < height; y++) {
      const row = y + pad.top;
      let from = row * stride + pad.left;
      for (let x = 0; x < width; x++, from++, at++) {
        const id = ids[from];
        if (id === 0 && plain && lut[0] === 0) continue;
        if (outline) {
          const column = x + pad.left;
          if (!((row > 0 && ids[from - stride] !== id) || (row < lastRow && ids[from + stride] !== id) ||
                (column > 0 && ids[from - 1] !== id) || (column < lastColumn && ids[from + 1] !== id))) continue;
        }
        out[at] = plain ? lut[id] : this.colorOf(id);
      }
    }
    context.putImageData(image, 0, 0);
    tile.version = this.style.version;
  }

  // Edges between different ids as paths, one per class: [id, Path2D in tile px].
  linesOf(tile) {
    if (tile.lines) return tile.lines;
    const paths = new Map();
    const { ids, stride, height, width, pad } = tile;
    const path = (id) => { let p = paths.get(id); if (!p) paths.set(id, p = new Path2D()); return p; };
    const rows = height + pad.top + pad.bottom;
    for (let row = Math.max(1, pad.top); row <= Math.min(rows - 1, pad.top + height); row++) {
      for (let x = 0; x < width;) {
        const from = row * stride + pad.left + x, a = ids[from - stride], b = ids[from];
        if (a === b) { x++; continue; }
        const start = x;
        do { x++; } while (x < width && ids[from + x - start] === b && ids[from + x - start - stride] === a);
        for (const id of [a, b]) if (id) { const p = path(id); p.moveTo(start, row - pad.top); p.lineTo(x, row - pad.top); }
      }
    }
    for (let column = Math.max(1, pad.left); column <= Math.min(stride - 1, pad.left + width); column++) {
      for (let y = 0; y < height;) {
        const from = (y + pad.top) * stride + column, a = ids[from - 1], b = ids[from];
        if (a === b) { y++; continue; }
        const start = y;
        do { y++; } while (y < height && ids[from + (y - start) * stride] === b && ids[from + (y - start) * stride - 1] === a);
        for (const id of [a, b]) if (id) { const p = path(id); p.moveTo(column - pad.left, start); p.lineTo(column - pad.left, y); }
      }
    }
    return (tile.lines = paths);
  }

  // The class id at a level-0 pixel if its finest tile is here, else undefined.
  valueAt(y, x) {
    const factor = this.info.levels[0].downsample;
    const ly = Math.floor(y / factor), lx = Math.floor(x / factor);
    const tile = this.tiles.get(`0/${Math.floor(ly / this.tilePx)}_${Math.floor(lx / this.tilePx)}`);
    if (!tile || !tile.ids || tile.stale) return undefined;
    return tile.ids[(ly - tile.ty * this.tilePx + tile.pad.top) * tile.stride + (lx - tile.tx * this.tilePx + tile.pad.left)];
  }

  // Draw onto `context`; view: {left, top, zoom} maps image px to screen px; visible: image-px box.
  draw(context, view, visible, opacity) {
    const levels = this.info.levels;
    let level = levels.length - 1;
    while (level > 0 && levels[level].downsample * view.zoom * view.ratio > 1.6) level--;
    context.globalAlpha = opacity;
    const factor = levels[level].downsample, side = this.tilePx;
    const [height, width] = levels[level].shape;
    const first = [Math.max(0, Math.floor(visible.y0 / factor / side)), Math.max(0, Math.floor(visible.x0 / factor / side))];
    const last = [Math.min(Math.ceil(height / side), Math.ceil(visible.y1 / factor / side)), Math.min(Math.ceil(width / side), Math.ceil(visible.x1 / factor / side))];
    for (let ty = first[0]; ty < last[0]; ty++) {
      for (let tx = first[1]; tx < last[1]; tx++) {
        const tile = this.request(level, ty, tx);
        if (tile.ids) this.drawTile(context, view, tile, factor);
        else this.drawCoarser(context, view, level, ty, tx);
      }
    }
    context.globalAlpha = 1;
  }

  drawTile(context, view, tile, factor) {
    const scale = factor * view.zoom;
    const left = view.left + tile.tx * this.tilePx * scale, top = view.top + tile.ty * this.tilePx * scale;
    if (this.style.mode === "outline" && scale >= CRISP_FROM && !this.info.instances) {
      context.save();
      context.beginPath();
      context.rect(left, top, tile.width * scale, tile.height * scale);
      context.clip();
      context.translate(left, top);
      context.scale(scale, scale);
      context.lineWidth = 2.5 / scale;
      for (const [id, path] of this.linesOf(tile)) {
        const shown = this.style.css.find((one) => one.value === id && one.shown);
        if (shown) { context.strokeStyle = `rgb(${shown.color.join(",")})`; context.stroke(path); }
      }
      context.restore();
      return;
    }
    this.paint(tile);
    // Whole screen px, so that neighbouring tiles leave no seam.
    const x0 = Math.round(left), y0 = Math.round(top);
    context.imageSmoothingEnabled = scale * view.ratio < 1;
    context.drawImage(tile.canvas, x0, y0, Math.round(left + tile.width * scale) - x0, Math.round(top + tile.height * scale) - y0);
  }

  drawCoarser(context, view, level, ty, tx) {
    const box = this.tileBox(level, ty, tx), fine = this.info.levels[level].downsample;
    for (let up = level + 1; up < this.info.levels.length; up++) {
      const coarse = this.info.levels[up].downsample, factor = coarse / fine;
      const cy = Math.floor(box.y0 / factor / this.tilePx), cx = Math.floor(box.x0 / factor / this.tilePx);
      const tile = this.tiles.get(`${up}/${cy}_${cx}`);
      if (!tile || !tile.ids) continue;
      context.save();
      context.beginPath();
      const scale = fine * view.zoom;
      context.rect(Math.round(view.left + box.x0 * scale), Math.round(view.top + box.y0 * scale), Math.ceil((box.x1 - box.x0) * scale), Math.ceil((box.y1 - box.y0) * scale));
      context.clip();
      this.drawTile(context, view, tile, coarse);
      context.restore();
      return;
    }
  }
}
