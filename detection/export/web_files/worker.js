// Runs the network, away from the page: it stays quick to the touch however long an image takes.
//
// In:  {kind: "open", backend: "webgpu" | "wasm"}             out: {kind: "ready", record, backend, threads, webgpu}
//      {kind: "run", bitmap}  (an ImageBitmap, handed over)        {kind: "found", bitmap, rows, milliseconds}
//      out at any time: {kind: "loading", text}, {kind: "failed", text}
// rows: [x1, y1, x2, y2, score, label] each, boxes in pixels of the image, best first: all that the model gives.

import { place } from "./pixels.js";

let ort, session, record;
const canvas = new OffscreenCanvas(1, 1);
const context = canvas.getContext("2d", { willReadFrequently: true });

let last = Promise.resolve();
self.onmessage = ({ data }) => {
  // One after the other: a session serves one call at a time.
  last = last.then(() => (data.kind === "open" ? open(data.backend) : run(data.bitmap))).catch((error) => {
    self.postMessage({ kind: "failed", text: error.message || String(error) });
  });
};

async function open(wanted) {
  record = await (await fetched("model.json")).json();
  const model = await bytes("model.onnx", "the model");
  const webgpu = record.record.precision !== "int8" && (await hasWebGpu()); // eight bits are for processors
  const backend = wanted === "webgpu" && webgpu ? "webgpu" : "wasm";
  self.postMessage({ kind: "loading", text: "Loading the runtime" });
  // Each build brings WebAssembly of its own; WebGPU's is twice as large and runs without WebGPU too.
  ort = await import(backend === "webgpu" ? "./ort/ort.webgpu.bundle.min.mjs" : "./ort/ort.wasm.bundle.min.mjs");
  // Threads share memory, which a browser allows to isolated pages alone (serve.py sends the headers for it).
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency || 1, 4) : 1;
  ort.env.logLevel = "error";
  let used = backend;
  try {
    session = await started(model, backend);
  } catch (error) {
    if (backend === "wasm") throw error;
    console.warn("WebGPU failed, WebAssembly takes over:", error);
    session = await started(model, (used = "wasm"));
  }
  self.postMessage({ kind: "ready", record, backend: used, threads: ort.env.wasm.numThreads, webgpu });
}

async function started(model, backend) {
  self.postMessage({ kind: "loading", text: "Starting the network" });
  const made = await ort.InferenceSession.create(model, { executionProviders: [backend], logSeverityLevel: 3 });
  const { width, height } = record.input;
  await made.run({ images: new ort.Tensor("uint8", new Uint8Array(3 * width * height), [1, 3, height, width]) }); // the first is slow
  return made;
}

async function hasWebGpu() {
  try {
    const adapter = await navigator.gpu?.requestAdapter();
    return Boolean(adapter) && !adapter.info?.isFallbackAdapter; // one in software is slower than WebAssembly
  } catch {
    return false;
  }
}

async function run(bitmap) {
  const { width, height } = bitmap;
  canvas.width = width;
  canvas.height = height;
  context.drawImage(bitmap, 0, 0);
  const placed = place(context.getImageData(0, 0, width, height), record.input);
  const size = [1, 3, record.input.height, record.input.width];
  const begin = performance.now();
  const { detections } = await session.run({ images: new ort.Tensor("uint8", placed.planes, size) });
  const milliseconds = performance.now() - begin;
  const rows = [];
  const [, count] = detections.dims;
  const values = detections.data;
  for (let at = 0; at < 6 * count; at += 6) {
    const score = values[at + 4];
    if (!(score > 0)) continue; // an empty row
    const x = (value) => Math.min(Math.max((value - placed.left) / placed.scaleX, 0), width);
    const y = (value) => Math.min(Math.max((value - placed.top) / placed.scaleY, 0), height);
    const row = [x(values[at]), y(values[at + 1]), x(values[at + 2]), y(values[at + 3]), score, values[at + 5]];
    if (row[2] > row[0] && row[3] > row[1]) rows.push(row);
  }
  detections.dispose?.();
  self.postMessage({ kind: "found", bitmap, rows, milliseconds }, [bitmap]);
}

async function fetched(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name} cannot be loaded (${response.status})`);
  return response;
}

/** A file as bytes; says how far it has come. */
async function bytes(name, what) {
  const response = await fetched(name);
  const total = Number(response.headers.get("Content-Length"));
  const reader = response.body.getReader();
  const parts = [];
  let have = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    have += value.length;
    const of = total ? ` of ${(total / 1e6).toFixed(1)}` : "";
    self.postMessage({ kind: "loading", text: `Loading ${what}: ${(have / 1e6).toFixed(1)}${of} MB` });
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}
