// The page: where images come from, and what is drawn. The network runs in worker.js.

const element = (id) => document.getElementById(id);
const view = element("view");
const context = view.getContext("2d");

const MOST_PIXELS = 16e6; // of an image: what a canvas of a telephone holds
const LONGEST_VIEW = 2000; // pixels of the drawn image

let worker, record;
let shown = null; // {bitmap, rows, milliseconds} of the image or frame on the stage
let video = null; // the <video> that frames come from, of a file or of the camera
let waiting = []; // {resolve, reject} of what was given to the worker, whose answers come in that order
let facing = "environment";

// ---------------------------------------------------------------- the network

function openWorker(backend) {
  worker?.terminate();
  waiting = [];
  setState("loading", "Loading");
  worker = new Worker("worker.js", { type: "module" });
  worker.onmessage = ({ data }) => answers[data.kind](data);
  worker.onerror = (event) => fail(event.message || "This browser cannot run the page; a current one can");
  worker.postMessage({ kind: "open", backend });
}

const answers = {
  loading: ({ text }) => setState("loading", text),
  failed: ({ text }) => {
    if (waiting.length) waiting.shift().reject(new Error(text));
    else fail(text);
  },
  ready: (given) => {
    record = given.record;
    describe(given);
    setState("ready", "");
    if (video) play();
    else if (shown) createImageBitmap(shown.bitmap).then(showImage);
  },
  found: (found) => waiting.shift().resolve(found),
};

/** What is in an image, which the worker hands back with it: {bitmap, rows, milliseconds}. */
function detect(bitmap) {
  return new Promise((resolve, reject) => {
    waiting.push({ resolve, reject });
    worker.postMessage({ kind: "run", bitmap }, [bitmap]);
  });
}

// ---------------------------------------------------------------- where images come from

async function openFile(file) {
  stop();
  if (file.type.startsWith("video/")) return openVideo(file);
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    if (!file.type) return openVideo(file);
    return fail(`${file.name} is not an image or a video that this browser can read`);
  }
  const share = Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height));
  if (share < 1) {
    const width = Math.floor(bitmap.width * share), height = Math.floor(bitmap.height * share);
    bitmap = await createImageBitmap(bitmap, { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
  }
  await showImage(bitmap);
}

async function showImage(bitmap) {
  setState("working", "Looking");
  try {
    const found = await detect(bitmap);
    if (video) return; // opened meanwhile
    show(found);
    setState("done", "");
  } catch (error) {
    fail(error.message);
  }
}

async function openVideo(file) {
  const source = newVideo();
  source.src = URL.createObjectURL(file);
  source.onended = () => setPaused(true);
  try {
    await source.play();
  } catch {
    stop();
    return fail(`${file.name} is not an image or a video that this browser can read`);
  }
  play();
}

async function openCamera() {
  stop();
  if (!navigator.mediaDevices) return fail("A browser lends its camera to https and to localhost alone; see serve.py");
  setState("working", "Waiting for the camera");
  const source = newVideo();
  try {
    const wanted = { facingMode: facing, width: { ideal: 1280 }, height: { ideal: 720 } };
    const stream = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    if (video !== source) return stream.getTracks().forEach((track) => track.stop()); // something else was opened
    source.srcObject = stream;
    await source.play();
  } catch (error) {
    if (video !== source) return;
    stop();
    const reasons = { NotAllowedError: "the permission was not given", NotFoundError: "there is none" };
    return fail(`The camera cannot be used: ${reasons[error.name] || error.message}`);
  }
  const devices = await navigator.mediaDevices.enumerateDevices();
  source.dataset.cameras = devices.filter((device) => device.kind === "videoinput").length;
  play();
}

function newVideo() {
  video = document.createElement("video");
  video.muted = true;
  video.playsInline = true;
  return video;
}

function stop() {
  if (!video) return;
  const old = video;
  video = null;
  old.pause();
  old.srcObject?.getTracks().forEach((track) => track.stop());
  if (old.src) URL.revokeObjectURL(old.src);
  old.removeAttribute("src");
  controls();
}

/** Frame after frame, as fast as the network takes them; what it had no time for is passed over. */
async function play() {
  const source = video;
  let finished = []; // when the last frames were
  let unread = 0; // looks in turn at a frame that could not be read
  shown = null;
  controls();
  setState("playing", "");
  while (video === source) {
    if (source.readyState < 2 || (source.paused && shown?.at === source.currentTime)) {
      await sleep(30);
      continue;
    }
    const at = source.currentTime;
    let found;
    try {
      found = await detect(await createImageBitmap(source));
    } catch (error) {
      if (video !== source) return;
      // A busy browser says for a moment that there is a frame before it can be read.
      if (error.name === "InvalidStateError" && unread++ < 100) {
        await sleep(30);
        continue;
      }
      stop();
      return fail(error.message);
    }
    unread = 0;
    if (video !== source) return;
    show({ ...found, at });
    finished.push(performance.now());
    finished = finished.slice(-20);
    if (finished.length > 1 && !source.paused) {
      const rate = (1000 * (finished.length - 1)) / (finished.at(-1) - finished[0]);
      write("rate", rate.toFixed(rate < 10 ? 1 : 0));
    }
    if (source.duration && document.activeElement !== seek) seek.value = at / source.duration;
    await nextFrame(source);
  }
}

const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** When the video has another frame, or it has been a moment. */
function nextFrame(source) {
  const wait = [sleep(100)];
  if (source.requestVideoFrameCallback) wait.push(new Promise((resolve) => source.requestVideoFrameCallback(resolve)));
  return Promise.race(wait);
}

// ---------------------------------------------------------------- what is drawn

function show(found) {
  if (shown && shown.bitmap !== found.bitmap) shown.bitmap.close();
  shown = found;
  write("time", `${found.milliseconds.toFixed(found.milliseconds < 10 ? 1 : 0)} ms`);
  view.hidden = false;
  element("welcome").hidden = true;
  draw();
}

function visible() {
  const thresholds = record.record.info.thresholds;
  const each = element("recorded").checked;
  const least = Number(threshold.value);
  return shown.rows.filter(([, , , , score, label]) => (each ? score >= thresholds[label] : score > least));
}

function draw() {
  if (!shown) return;
  const { bitmap } = shown;
  const rows = visible();
  view.style.setProperty("--aspect", bitmap.width / bitmap.height);
  // As fine as the screen shows it, or as the image is.
  const finest = Math.max(bitmap.width, view.clientWidth * devicePixelRatio);
  const scale = Math.min(finest / bitmap.width, LONGEST_VIEW / Math.max(bitmap.width, bitmap.height));
  const width = Math.round(bitmap.width * scale), height = Math.round(bitmap.height * scale);
  if (view.width !== width || view.height !== height) {
    view.width = width;
    view.height = height;
  }
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  drawBoxes(rows, scale, view.width / (view.clientWidth || view.width));
  list(rows);
  controls();
}

/** @param {number} dot pixels of the canvas to a pixel of the page: lines and letters look the same on any image */
function drawBoxes(rows, scale, dot) {
  const narrow = view.clientWidth < 500;
  const size = (narrow ? 11 : 13) * dot;
  const high = size + 6 * dot;
  context.font = `600 ${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  context.lineJoin = "round";
  const taken = []; // by the labels of better ones
  const placed = rows.map(([x1, y1, x2, y2, score, label]) => {
    const box = [x1 * scale, y1 * scale, (x2 - x1) * scale, (y2 - y1) * scale];
    const name = narrow && record.names.length === 1 ? "" : `${record.names[label] ?? label} `; // it goes without saying
    const text = name + score.toFixed(2);
    const wide = context.measureText(text).width + 8 * dot;
    const x = Math.max(0, Math.min(box[0] - 1.25 * dot, view.width - wide));
    const above = box[1] - high, inside = box[1], below = box[1] + box[3];
    const free = (y) => y >= 0 && y + high <= view.height && !taken.some(
      (other) => x < other[0] + other[2] && other[0] < x + wide && y < other[1] + high && other[1] < y + high,
    );
    const y = [above, inside, below].find(free) ?? Math.max(0, above);
    const place = [x, y, wide];
    taken.push(place);
    return { box, text, place, ...colour(label) };
  });
  for (const { box, fill } of placed.reverse()) { // the best on top
    context.strokeStyle = fill;
    context.lineWidth = 2.5 * dot;
    context.strokeRect(...box);
  }
  for (const { text, place: [x, y, wide], fill, ink } of placed) {
    context.fillStyle = fill;
    context.fillRect(x, y, wide, high);
    context.fillStyle = ink;
    context.fillText(text, x + 4 * dot, y + high / 2);
  }
}

/** Colour of a class by its label alone, and of letters on it. Neighbours are far apart on the circle of hues. */
function colour(label) {
  const hue = (207 + label * 137.508) % 360;
  const dark = hue > 215 && hue < 300; // blues and violets
  return { fill: `hsl(${hue} 85% ${dark ? 62 : 48}%)`, ink: dark || hue < 20 || hue > 300 ? "#fff" : "#000" };
}

function list(rows) {
  write("count", rows.length);
  const counts = new Map();
  for (const row of rows) counts.set(row[5], (counts.get(row[5]) || 0) + 1);
  element("legend").replaceChildren(
    ...[...counts].sort((one, other) => other[1] - one[1]).map(([label, count]) => {
      const item = make("li", `${record.names[label] ?? label} ${count}`);
      const chip = make("i", "");
      chip.style.background = colour(label).fill;
      item.prepend(chip);
      return item;
    }),
  );
  if (!element("list").open) return;
  element("rows").replaceChildren(
    ...rows.map(([x1, y1, x2, y2, score, label]) => {
      const row = make("tr", "");
      row.append(make("td", record.names[label] ?? label), make("td", score.toFixed(3)));
      row.append(...[x1, y1, x2, y2].map((value) => make("td", value.toFixed(1))));
      return row;
    }),
  );
}

function describe({ backend, threads, webgpu }) {
  const { record: inner, names, input } = record;
  const classes = names.length === 1 ? names[0] : `${names.length} classes: ${names.slice(0, 8).join(", ")}${names.length > 8 ? ", …" : ""}`;
  write("summary", `Finds ${classes}`);
  const runs = backend === "webgpu" ? "WebGPU" : `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
  write("runtime", webgpu ? "" : `Runs on ${runs}.`);
  element("backend-row").hidden = !webgpu;
  element("backend").value = backend;
  document.body.dataset.backend = backend;
  document.body.dataset.threads = threads;
  const { ap, num_images: images, processor } = inner.measured;
  const facts = {
    Classes: names.join(", "),
    Input: `${input.width} × ${input.height} pixels, ${input.resize}`,
    Numbers: inner.precision + (inner.variant ? ` (${inner.variant})` : ""),
    AP: ap === null ? "not measured" : `${ap.toFixed(3)} on ${images} images, on ${processor}`,
    Source: inner.info.source,
    Licence: inner.info.licence,
    "Checkpoint, SHA-256": inner.checkpoint_sha256,
    "Made with": Object.entries(inner.versions).map((one) => one.join(" ")).join(", "),
  };
  element("about").replaceChildren(
    ...Object.entries(facts).filter(([, value]) => value).flatMap(([name, value]) => [make("dt", name), make("dd", value)]),
  );
  const least = inner.info.postprocess.score_threshold;
  threshold.min = Math.ceil(100 * least) / 100; // what the model itself drops cannot be shown
  element("recorded-row").hidden = !inner.info.thresholds.length;
  element("recorded").checked = inner.info.thresholds.length > 0;
  showThreshold();
}

// ---------------------------------------------------------------- the page

const make = (tag, text) => Object.assign(document.createElement(tag), { textContent: text });
const write = (id, text) => { element(id).textContent = text; };

function setState(state, text) {
  document.body.dataset.state = state;
  const status = element("status");
  status.textContent = text;
  status.hidden = !text;
  status.className = state === "error" ? "error" : "";
  const off = state === "loading" || !record;
  element("choose").disabled = off;
  element("camera").disabled = off;
}

const fail = (text) => setState("error", text);

function controls() {
  const camera = Boolean(video?.srcObject), file = Boolean(video && !camera);
  element("camera").textContent = camera ? "Stop the camera" : "Camera";
  element("flip").hidden = !(camera && Number(video.dataset.cameras) > 1);
  element("pause").hidden = !file;
  element("seeking").hidden = !file;
  element("save").hidden = !shown;
  element("legend").hidden = !shown;
  if (!video) write("rate", "-");
}

function setPaused(paused) {
  if (!video) return;
  if (paused) video.pause();
  else video.play();
  write("pause", paused ? "Play" : "Pause");
}

function showThreshold() {
  write("threshold-text", element("recorded").checked ? "–" : Number(threshold.value).toFixed(2));
  draw();
}

const threshold = element("threshold");
const seek = element("seek");
element("choose").onclick = () => element("file").click();
element("file").onchange = ({ target }) => {
  if (target.files.length) openFile(target.files[0]);
  target.value = ""; // the same file may be chosen again
};
element("camera").onclick = () => {
  if (!video?.srcObject) return openCamera();
  stop();
  setState("done", "");
};
element("flip").onclick = () => {
  facing = facing === "environment" ? "user" : "environment";
  openCamera();
};
element("pause").onclick = () => setPaused(!video.paused);
seek.oninput = () => { if (video?.duration) video.currentTime = seek.value * video.duration; };
threshold.oninput = () => {
  element("recorded").checked = false;
  showThreshold();
};
element("recorded").onchange = showThreshold;
element("list").ontoggle = draw;
element("backend").onchange = ({ target }) => openWorker(target.value);
element("save").onclick = () => view.toBlob((blob) => {
  const link = Object.assign(make("a", ""), { href: URL.createObjectURL(blob), download: "detections.png" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
const stage = element("stage");
stage.onclick = () => { if (!shown && record) element("choose").click(); };
window.ondragover = (event) => {
  event.preventDefault();
  stage.classList.add("over");
};
window.ondragleave = (event) => { if (!event.relatedTarget) stage.classList.remove("over"); };
window.ondrop = (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  if (record && event.dataTransfer.files.length) openFile(event.dataTransfer.files[0]);
};
window.onpaste = (event) => { if (record && event.clipboardData.files.length) openFile(event.clipboardData.files[0]); };
new ResizeObserver(draw).observe(view);

openWorker("webgpu");
