// The color scales of convlens's figures, and canvases painted with them.

// Seventeen colors at equal distances of matplotlib's color maps; the others are interpolated.
export const SCALES = {
  viridis: "44015448186a472d7b4240863b528b33638d2c728e26828e21918c1fa08828ae803fbc735ec96284d44baddc30d8e219fde725",
  RdBu_r: "0530611752902a71b23f8ec06bacd19bc9e0c2ddece0ecf3f7f6f6fbe5d8fbccb4f5aa89e48066d05548ba2832930e2667001f",
  PuOr_r: "2d004b4518715f3a917b6aa89990bfb7b1d5cfcfe5e4e5f0f7f7f6fce8cdfed59ffdbc6bee9b39d97b12bd61099e4c077f3b08",
};
const tables = new Map();

function table(scale) {
  if (!tables.has(scale)) {
    const stops = SCALES[scale].match(/../g).map((part) => parseInt(part, 16));
    const colors = new Uint8ClampedArray(256 * 3), last = stops.length / 3 - 1;
    for (let value = 0; value < 256; value++) {
      const position = (value / 255) * last, left = Math.min(Math.floor(position), last - 1);
      for (let c = 0; c < 3; c++) {
        const a = stops[3 * left + c], b = stops[3 * left + 3 + c];
        colors[3 * value + c] = a + (b - a) * (position - left);
      }
    }
    tables.set(scale, colors);
  }
  return tables.get(scale);
}

export const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// Paint one map, a byte for each value, in the size of the map; `alpha` gives the opacity of a byte.
export function paintMap(canvas, bytes, width, height, scale, alpha = () => 1) {
  const colors = table(scale);
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    image.data.set(colors.subarray(3 * bytes[i], 3 * bytes[i] + 3), 4 * i);
    image.data[4 * i + 3] = 255 * alpha(bytes[i]);
  }
  put(canvas, image);
}

// Paint gray or RGB pixels, as the server sends those of an image.
export function paintPixels(canvas, bytes, width, height, channels) {
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = bytes[channels * i + (channels === 3 ? c : 0)];
    image.data[4 * i + 3] = 255;
  }
  put(canvas, image);
}

function put(canvas, image) {
  canvas.width = image.width;
  canvas.height = image.height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
