// An image at the network's input size, with the same resampling as in training and evaluation (OpenCV's):
// bilinear up to a shrinkage of two, beyond it averages over areas; or TensorFlow 1's bilinear, which takes no averages.

/**
 * @param {{data: Uint8ClampedArray, width: number, height: number}} image RGBA, as a canvas gives it
 * @param {{width: number, height: number, resize: string, fill: number[]}} input of model.json
 * @returns {{planes: Uint8Array, scaleX: number, scaleY: number, left: number, top: number}} planes: [3, height, width], RGB;
 *   a point x of the image lies at x * scaleX + left
 */
export function place(image, input) {
  const { width, height } = input;
  const planes = new Uint8Array(3 * width * height);
  if (input.resize !== "letterbox") {
    copy(resize(image, width, height, input.resize === "stretch_tensorflow"), width, height, planes, width, 0, 0);
    return { planes, scaleX: width / image.width, scaleY: height / image.height, left: 0, top: 0 };
  }
  const scale = Math.min(width / image.width, height / image.height);
  const newWidth = Math.max(roundHalfEven(image.width * scale), 1);
  const newHeight = Math.max(roundHalfEven(image.height * scale), 1);
  const left = Math.floor((width - newWidth) / 2);
  const top = Math.floor((height - newHeight) / 2);
  for (let channel = 0; channel < 3; channel++) {
    planes.fill(input.fill[channel], channel * width * height, (channel + 1) * width * height);
  }
  copy(resize(image, newWidth, newHeight, false), newWidth, newHeight, planes, width, left, top);
  return { planes, scaleX: newWidth / image.width, scaleY: newHeight / image.height, left, top };
}

/** Python's round. */
function roundHalfEven(value) {
  const floor = Math.floor(value);
  if (value - floor !== 0.5) return Math.round(value);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** RGB [height, width, 3] into planes [3, H, planeWidth] at (left, top). */
function copy(pixels, width, height, planes, planeWidth, left, top) {
  const size = planes.length / 3;
  for (let y = 0, from = 0; y < height; y++) {
    for (let x = 0, to = (y + top) * planeWidth + left; x < width; x++, to++, from += 3) {
      planes[to] = pixels[from];
      planes[to + size] = pixels[from + 1];
      planes[to + 2 * size] = pixels[from + 2];
    }
  }
}

/** @returns {Uint8Array} RGB [height, width, 3] */
function resize(image, width, height, asTensorFlow) {
  const out = new Uint8Array(3 * width * height);
  const source = image.data;
  if (image.width === width && image.height === height) {
    for (let from = 0, to = 0; to < out.length; from += 4, to += 3) {
      out[to] = source[from];
      out[to + 1] = source[from + 1];
      out[to + 2] = source[from + 2];
    }
    return out;
  }
  let rule = linear;
  if (asTensorFlow) rule = linearFromCorner;
  else if (image.height > 2 * height || image.width > 2 * width) {
    rule = image.height >= height && image.width >= width ? area : linearByArea;
  }
  const columns = rule(image.width, width);
  const rows = rule(image.height, height);
  // Across, then down. Of the rows across only those are made that a row of the result asks for.
  const across = new Map();
  const rowAcross = (y) => {
    let row = across.get(y);
    if (row) return row;
    row = new Float32Array(3 * width);
    const line = 4 * y * image.width;
    for (let x = 0; x < width; x++) {
      let red = 0, green = 0, blue = 0;
      for (let tap = columns.begin[x]; tap < columns.begin[x + 1]; tap++) {
        const weight = columns.weight[tap];
        const from = line + 4 * columns.place[tap];
        red += weight * source[from];
        green += weight * source[from + 1];
        blue += weight * source[from + 2];
      }
      row[3 * x] = red;
      row[3 * x + 1] = green;
      row[3 * x + 2] = blue;
    }
    across.set(y, row);
    return row;
  };
  const sum = new Float32Array(3 * width);
  for (let y = 0; y < height; y++) {
    sum.fill(0);
    for (let tap = rows.begin[y]; tap < rows.begin[y + 1]; tap++) {
      const weight = rows.weight[tap];
      const row = rowAcross(rows.place[tap]);
      for (let index = 0; index < sum.length; index++) sum[index] += weight * row[index];
    }
    for (const kept of across.keys()) if (kept < rows.place[rows.begin[y + 1] - 1]) across.delete(kept);
    for (let index = 0, to = 3 * y * width; index < sum.length; index++, to++) out[to] = sum[index] + 0.5;
  }
  return out;
}

// Each rule says of every pixel of the result which pixels of the source it is made of, along one axis:
// those of result i are place[begin[i]] .. place[begin[i + 1] - 1] with their weights.

function taps(length, of) {
  const begin = [0], place = [], weight = [];
  for (let index = 0; index < length; index++) {
    for (const [where, share] of of(index)) {
      place.push(where);
      weight.push(share);
    }
    begin.push(place.length);
  }
  return { begin: Int32Array.from(begin), place: Int32Array.from(place), weight: Float32Array.from(weight) };
}

function between(position, share, from) {
  const first = Math.min(Math.max(position, 0), from - 1);
  const second = Math.min(Math.max(position + 1, 0), from - 1);
  return [[first, 1 - share], [second, share]];
}

/** Middle of pixel to middle of pixel. */
function linear(from, to) {
  const scale = from / to;
  return taps(to, (index) => {
    const middle = (index + 0.5) * scale - 0.5;
    return between(Math.floor(middle), middle - Math.floor(middle), from);
  });
}

/** TensorFlow 1: corner to corner. */
function linearFromCorner(from, to) {
  const scale = from / to;
  return taps(to, (index) => {
    const position = index * scale;
    return between(Math.floor(position), position - Math.floor(position), from);
  });
}

/** The mean of the stretch that a pixel of the result covers. */
function area(from, to) {
  const scale = from / to;
  return taps(to, (index) => {
    const start = index * scale, end = Math.min(start + scale, from);
    const found = [];
    for (let where = Math.floor(start); where < Math.ceil(end - 1e-6); where++) {
      const share = Math.min(where + 1, end) - Math.max(where, start);
      if (share > 1e-6) found.push([where, share / (end - start)]);
    }
    return found;
  });
}

/** What OpenCV's INTER_AREA does on both axes where one of them grows. */
function linearByArea(from, to) {
  const scale = from / to;
  return taps(to, (index) => {
    const position = Math.floor(index * scale);
    const rest = index + 1 - (position + 1) / scale;
    return between(position, rest <= 0 ? 0 : rest - Math.floor(rest), from);
  });
}
