// One view of a slide: OpenSeadragon for the image, a canvas above it for masks and marks.

export class Pane {
  constructor(element, app) {
    this.element = element;
    this.app = app;
    this.viewer = new OpenSeadragon.Viewer({
      element,
      drawer: "canvas",
      showNavigationControl: false,
      showNavigator: true,
      navigatorPosition: "BOTTOM_RIGHT",
      navigatorAutoFade: false,
      navigatorSizeRatio: 0.17,
      navigatorOpacity: 1,
      navigatorMaintainSizeRatio: false,
      maxZoomPixelRatio: 24,
      minZoomImageRatio: 0.6,
      visibilityRatio: 0.3,
      animationTime: 0.5,
      springStiffness: 9,
      blendTime: 0,
      immediateRender: false,
      maxImageCacheCount: 400,
      imageLoaderLimit: 8,
      timeout: 60000,
      gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
      gestureSettingsTouch: { pinchRotate: false },
      keyboardNavEnabled: false,
      preserveImageSizeOnResize: true,
    });
    this.viewer.innerTracker.keyDownHandler = null;
    this.viewer.innerTracker.keyHandler = null;
    element.querySelector(".openseadragon-canvas")?.setAttribute("aria-label", "Slide: drag to move, scroll to zoom");
    this.canvas = document.createElement("canvas");
    this.canvas.className = "overlay";
    this.viewer.canvas.appendChild(this.canvas);
    this.context = this.canvas.getContext("2d");
    this.image = null;
    this.wanted = 0;
    this.viewer.addHandler("update-viewport", () => this.draw());
    this.viewer.addHandler("animation", () => app.moved(this));
    this.viewer.addHandler("animation-finish", () => app.settled(this));
    this.viewer.addHandler("resize", () => this.draw());
  }

  // Show an image; the former one stays until the new one is drawn, so nothing flickers.
  show(source, sourceIndex, query, done) {
    const wanted = ++this.wanted;
    const levels = source.levels, top = levels.length - 1, old = this.image;
    const format = source.has_image ? "jpg" : "png";
    const tileSource = new OpenSeadragon.TileSource({
      width: source.extent[1], height: source.extent[0], tileSize: source.tile_px, tileOverlap: 0, minLevel: 0, maxLevel: top,
      getLevelScale: (level) => 1 / levels[top - level].downsample,
      getTileUrl: (level, x, y) => `t/${sourceIndex}/image/${top - level}/${y}_${x}.${format}${query}`,
    });
    this.viewer.addTiledImage({
      tileSource, index: 0, x: 0, y: 0, width: 1,
      success: ({ item }) => {
        if (wanted !== this.wanted) { this.viewer.world.removeItem(item); return; }
        if (!this.image) this.viewer.viewport.goHome(true);
        this.image = item;
        this.extent = source.extent;
        if (old) {
          const remove = () => { if (this.viewer.world.getIndexOfItem(old) >= 0) this.viewer.world.removeItem(old); };
          if (item.getFullyLoaded()) remove(); else { item.addOnceHandler("fully-loaded-change", remove); setTimeout(remove, 4000); }
        }
        this.filter();
        if (done) done();
      },
    });
  }

  get ready() { return this.image !== null; }

  // Screen px per image px, and where image px (0, 0) stands on the screen.
  view(current = true) {
    const viewport = this.viewer.viewport, size = viewport.getContainerSize();
    const bounds = viewport.getBoundsNoRotate(current);
    const zoom = size.x / (bounds.width * this.extent[1]);
    return { zoom, left: -bounds.x * this.extent[1] * zoom, top: -bounds.y * this.extent[1] * zoom, width: size.x, height: size.y, ratio: Math.min(2, window.devicePixelRatio || 1) };
  }

  // Image px at the middle, and the zoom.
  place(current = false) {
    const { zoom, left, top, width, height } = this.view(current);
    return { y: (height / 2 - top) / zoom, x: (width / 2 - left) / zoom, zoom };
  }

  // Go to a place, as far as a hand could: near the slide, within the limits of zoom, or at 1:1.
  goTo(place, immediately = false) {
    const viewport = this.viewer.viewport, size = viewport.getContainerSize(), [height, width] = this.extent;
    const within = (value, least, most) => Math.min(most, Math.max(least, value)), one = size.x / width;
    const zoom = within(place.zoom || this.place().zoom, Math.min(1, viewport.getMinZoom() * one), viewport.getMaxZoom() * one);
    const inside = (value, side, screen) => within(value, -0.2 * screen / zoom, side + 0.2 * screen / zoom);
    viewport.fitBounds(this.boundsAt({ y: inside(place.y, height, size.y), x: inside(place.x, width, size.x), zoom }), immediately);
  }

  // Show what another pane shows, wherever that is.
  follow(place) {
    this.viewer.viewport.fitBounds(this.boundsAt(place), true);
  }

  boundsAt({ y, x, zoom }) {
    const size = this.viewer.viewport.getContainerSize(), width = this.extent[1];
    const span = size.x / zoom / width, tall = span * size.y / size.x;
    return new OpenSeadragon.Rect(x / width - span / 2, y / width - tall / 2, span, tall);
  }

  toImage(point) {
    const { zoom, left, top } = this.view(true);
    return { y: (point.y - top) / zoom, x: (point.x - left) / zoom };
  }

  filter() {
    const { brightness, contrast } = this.app.settings;
    const canvas = this.viewer.drawer?.canvas;
    if (canvas) canvas.style.filter = brightness === 100 && contrast === 100 ? "" : `brightness(${brightness}%) contrast(${contrast}%)`;
  }

  redraw() {
    if (this.pending) return;
    this.pending = requestAnimationFrame(() => { this.pending = 0; this.draw(); });
  }

  draw() {
    if (!this.ready) return;
    const view = this.view(true), ratio = view.ratio;
    const width = Math.round(view.width * ratio), height = Math.round(view.height * ratio);
    if (this.canvas.width !== width || this.canvas.height !== height) { this.canvas.width = width; this.canvas.height = height; }
    this.viewer.drawer.setImageSmoothingEnabled(view.zoom < 2);
    const context = this.context;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, view.width, view.height);
    const visible = { y0: Math.max(0, -view.top / view.zoom), x0: Math.max(0, -view.left / view.zoom), y1: Math.min(this.extent[0], (view.height - view.top) / view.zoom), x1: Math.min(this.extent[1], (view.width - view.left) / view.zoom) };
    if (visible.y1 > visible.y0 && visible.x1 > visible.x0) {
      this.app.paint(this, context, view, visible);
    }
    this.app.drawn(this, view);
  }
}

// Lines and boxes over the slide: write units, tiles, their state, the certificate's places.
export function drawMarks(context, view, visible, marks) {
  const rect = ([y0, x0, y1, x1]) => [view.left + x0 * view.zoom, view.top + y0 * view.zoom, (x1 - x0) * view.zoom, (y1 - y0) * view.zoom];
  const grid = (step, color, dash) => {
    if (step * view.zoom < 5) return;
    context.save();
    context.strokeStyle = color;
    context.setLineDash(dash);
    context.lineWidth = 1;
    context.beginPath();
    for (let y = Math.ceil(visible.y0 / step) * step; y <= visible.y1; y += step) {
      const at = Math.round(view.top + y * view.zoom) + 0.5;
      context.moveTo(view.left + visible.x0 * view.zoom, at);
      context.lineTo(view.left + visible.x1 * view.zoom, at);
    }
    for (let x = Math.ceil(visible.x0 / step) * step; x <= visible.x1; x += step) {
      const at = Math.round(view.left + x * view.zoom) + 0.5;
      context.moveTo(at, view.top + visible.y0 * view.zoom);
      context.lineTo(at, view.top + visible.y1 * view.zoom);
    }
    context.stroke();
    context.restore();
  };
  for (const { box, color } of marks.fills) {
    const [x, y, width, height] = rect(box);
    context.fillStyle = color;
    context.fillRect(x + 1, y + 1, width - 2, height - 2);
  }
  if (marks.tileStep) grid(marks.tileStep, "rgba(255, 200, 60, .75)", [3, 4]);
  if (marks.unitStep) grid(marks.unitStep, "rgba(80, 150, 255, .95)", []);
  for (const { box, color } of marks.boxes) {
    const [x, y, width, height] = rect(box);
    context.lineWidth = 2;
    context.strokeStyle = color;
    context.strokeRect(x, y, Math.max(width, 4), Math.max(height, 4));
  }
}

// A round length for the scale bar: { px: screen px, text }.
export function scaleBar(zoom, mpp) {
  const unit = mpp ? mpp[1] : 1, target = 130 * unit / zoom;
  const power = 10 ** Math.floor(Math.log10(target));
  const length = [5, 2, 1].map((step) => step * power).find((one) => one <= target);
  let text = `${+length.toPrecision(2)} px`;
  if (mpp) text = length >= 1000 ? `${+(length / 1000).toPrecision(2)} mm` : length < 1 ? `${+(length * 1000).toPrecision(2)} nm` : `${+length.toPrecision(2)} µm`;
  return { px: length / unit * zoom, text };
}
