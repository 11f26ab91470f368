// Pictures as ConvLLaVA reads them: padded to a square in the mean colour, resized as PIL does (bicubic with a = -0.5
// over the covered area, rounded to whole levels after each direction), then scaled and normalised.

const cubic = (x) => {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
};

/** For each new position along one side: the first old position and the weights of it and its followers. */
function makeWeights(before, after) {
  const scale = before / after;
  const reach = 2 * Math.max(scale, 1);
  return Array.from({ length: after }, (_, index) => {
    const centre = (index + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - reach + 0.5));
    const last = Math.min(before, Math.floor(centre + reach + 0.5));
    const weights = Array.from({ length: last - first }, (_, k) =>
      cubic((first + k - centre + 0.5) / Math.max(scale, 1)),
    );
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((weight) => weight / sum)];
  });
}

/** Resizes along x: `pixels` has three levels per pixel, row by row. */
function resizeRows(pixels, width, height, newWidth) {
  if (width === newWidth) return pixels;
  const result = new Uint8ClampedArray(newWidth * height * 3);
  makeWeights(width, newWidth).forEach(([first, weights], x) => {
    for (let y = 0; y < height; ++y) {
      for (let c = 0; c < 3; ++c) {
        let sum = 0;
        weights.forEach((weight, k) => (sum += weight * pixels[(y * width + first + k) * 3 + c]));
        result[(y * newWidth + x) * 3 + c] = Math.floor(sum + 0.5);
      }
    }
  });
  return result;
}

function transpose(pixels, width, height) {
  const result = new Uint8ClampedArray(pixels.length);
  for (let y = 0; y < height; ++y) {
    for (let x = 0; x < width; ++x) {
      for (let c = 0; c < 3; ++c) result[(x * height + y) * 3 + c] = pixels[(y * width + x) * 3 + c];
    }
  }
  return result;
}

function padToSquare(pixels, width, height, mean) {
  const side = Math.max(width, height);
  if (width === height) return [pixels, side];
  const left = Math.floor((side - width) / 2);
  const top = Math.floor((side - height) / 2);
  const square = new Uint8ClampedArray(side * side * 3);
  for (let i = 0; i < square.length; ++i) square[i] = Math.trunc(mean[i % 3] * 255);
  for (let y = 0; y < height; ++y) {
    square.set(pixels.subarray(y * width * 3, (y + 1) * width * 3), ((top + y) * side + left) * 3);
  }
  return [square, side];
}

/**
 * @param {Uint8ClampedArray} pixels red, green and blue of each pixel, row by row
 * @param {number} width @param {number} height of the picture
 * @param {object} settings of preprocessor_config.json
 * @returns {[Float32Array, number[]]} values and shape (1, 3, height, width)
 */
export function preparePicture(pixels, width, height, settings) {
  const { image_mean: mean, image_std: std, rescale_factor: factor, size } = settings;
  const newWidth = size.width ?? size.shortest_edge;
  const newHeight = size.height ?? size.shortest_edge;
  if ((settings.image_aspect_ratio ?? 'pad') === 'pad') {
    [pixels, width] = padToSquare(pixels, width, height, mean);
    height = width;
  }
  pixels = resizeRows(pixels, width, height, newWidth);
  pixels = transpose(resizeRows(transpose(pixels, newWidth, height), height, newWidth, newHeight), newHeight, newWidth);
  const values = new Float32Array(3 * newWidth * newHeight);
  const area = newWidth * newHeight;
  for (let i = 0; i < area; ++i) {
    for (let c = 0; c < 3; ++c) values[c * area + i] = (pixels[i * 3 + c] * factor - mean[c]) / std[c];
  }
  return [values, [1, 3, newHeight, newWidth]];
}
