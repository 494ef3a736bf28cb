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

/** @returns {Uint8Array | Uint8ClampedArray} RGB [height, width, 3] */
function resize(image, width, height, asTensorFlow) {
  if (image.width === width && image.height === height) return withoutAlpha(image.data);
  if (asTensorFlow) return bilinearFromCorner(image, width, height);
  if (image.height <= 2 * height && image.width <= 2 * width) return bilinear(image, width, height);
  return averaged(image, width, height, image.height >= height && image.width >= width ? area : linearByArea);
}

function withoutAlpha(source) {
  const out = new Uint8Array((3 * source.length) / 4);
  for (let from = 0, to = 0; to < out.length; from += 4, to += 3) {
    out[to] = source[from];
    out[to + 1] = source[from + 1];
    out[to + 2] = source[from + 2];
  }
  return out;
}

/** OpenCV's INTER_LINEAR, in its integers: weights of 11 bits, middle of pixel to middle of pixel. */
function bilinear(image, width, height) {
  const axis = (from, to) => {
    const first = new Int32Array(to), second = new Int32Array(to), share = new Int32Array(to), rest = new Int32Array(to);
    for (let index = 0; index < to; index++) {
      const middle = Math.fround((index + 0.5) * (from / to) - 0.5);
      let place = Math.floor(middle), part = Math.fround(middle - place);
      if (place < 0 || place >= from - 1) {
        place = Math.min(Math.max(place, 0), from - 1);
        part = 0;
      }
      first[index] = place;
      second[index] = Math.min(place + 1, from - 1);
      share[index] = roundHalfEven(part * 2048);
      rest[index] = roundHalfEven(Math.fround(1 - part) * 2048);
    }
    return { first, second, share, rest };
  };
  const source = image.data, columns = axis(image.width, width), rows = axis(image.height, height);
  const made = new Map(); // rows of the source, resized across
  const across = (y) => {
    let row = made.get(y);
    if (row) return row;
    row = new Int32Array(3 * width);
    for (let x = 0, to = 0; x < width; x++) {
      let one = 4 * (y * image.width + columns.first[x]), other = 4 * (y * image.width + columns.second[x]);
      for (let channel = 0; channel < 3; channel++) {
        row[to++] = source[one++] * columns.rest[x] + source[other++] * columns.share[x];
      }
    }
    made.set(y, row);
    return row;
  };
  const out = new Uint8Array(3 * width * height);
  for (let y = 0, to = 0; y < height; y++) {
    const upper = across(rows.first[y]), lower = across(rows.second[y]);
    const rest = rows.rest[y], share = rows.share[y];
    for (const kept of made.keys()) if (kept < rows.first[y]) made.delete(kept);
    for (let index = 0; index < upper.length; index++) {
      out[to++] = (((rest * (upper[index] >> 4)) >> 16) + ((share * (lower[index] >> 4)) >> 16) + 2) >> 2;
    }
  }
  return out;
}

/** TensorFlow 1's bilinear, as OpenCV's warpAffine computes it in float32: corner to corner. */
function bilinearFromCorner(image, width, height) {
  const axis = (from, to) => {
    const first = new Int32Array(to), second = new Int32Array(to), share = new Float32Array(to);
    const scale = Math.fround(from / to);
    for (let index = 0; index < to; index++) {
      const position = Math.fround(index * scale), place = Math.floor(position);
      first[index] = Math.min(place, from - 1);
      second[index] = Math.min(place + 1, from - 1);
      share[index] = position - place;
    }
    return { first, second, share };
  };
  const between = (one, other, share) => Math.fround(one + Math.fround(share * Math.fround(other - one)));
  const source = image.data, columns = axis(image.width, width), rows = axis(image.height, height);
  const out = new Uint8ClampedArray(3 * width * height); // which rounds halves to even, as OpenCV does
  for (let y = 0, to = 0; y < height; y++) {
    const upper = rows.first[y] * image.width, lower = rows.second[y] * image.width, down = rows.share[y];
    for (let x = 0; x < width; x++) {
      const left = columns.first[x], right = columns.second[x], share = columns.share[x];
      for (let channel = 0; channel < 3; channel++) {
        const above = between(source[4 * (upper + left) + channel], source[4 * (upper + right) + channel], share);
        const below = between(source[4 * (lower + left) + channel], source[4 * (lower + right) + channel], share);
        out[to++] = between(above, below, down);
      }
    }
  }
  return out;
}

/** Across, then down, each pixel as the rule says what it is made of. */
function averaged(image, width, height, rule) {
  const source = image.data, columns = rule(image.width, width), rows = rule(image.height, height);
  const made = new Map(); // rows of the source, resized across
  const across = (y) => {
    let row = made.get(y);
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
    made.set(y, row);
    return row;
  };
  const out = new Uint8ClampedArray(3 * width * height);
  const sum = new Float32Array(3 * width);
  for (let y = 0; y < height; y++) {
    sum.fill(0);
    for (let tap = rows.begin[y]; tap < rows.begin[y + 1]; tap++) {
      const weight = rows.weight[tap], row = across(rows.place[tap]);
      for (let index = 0; index < sum.length; index++) sum[index] += weight * row[index];
    }
    for (const kept of made.keys()) if (kept < rows.place[rows.begin[y + 1] - 1]) made.delete(kept);
    out.set(sum, 3 * y * width);
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
