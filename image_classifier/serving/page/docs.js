"use strict";

/* Sends the requests of the forms in the API documentation. */

const MAX_SHOWN = 100_000; // characters
const isJson = (type) => type === "application/json";
let model = null;

function getHeaders() {
  const key = document.getElementById("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/* Fills in the model's name, version and image size. */
async function loadModel() {
  const answer = await fetch("model", { headers: getHeaders() });
  if (!answer.ok) return;
  model = await answer.json();
  for (const input of document.querySelectorAll("[data-in=path]")) input.value ||= model[{ model: "name" }[input.name] ?? input.name] ?? "";
  document.querySelectorAll("form.try").forEach(adapt);
}

/* Shows the input element for the chosen media type. */
function adapt(form) {
  const type = form.elements.type?.value;
  if (type === undefined) return;
  const text = form.querySelector(".text");
  text.hidden = !isJson(type);
  form.querySelector(".file").hidden = isJson(type) && form.dataset.path !== "/predict";
  const area = text.querySelector("textarea");
  if (isJson(type) && !area.value && model && form.dataset.path.endsWith("/infer")) {
    const [side, data] = [model.image_size, new Array(3 * model.image_size ** 2).fill(128)];
    const inputs = [{ name: "images", shape: [1, side, side, 3], datatype: "UINT8", data }];
    area.value = JSON.stringify({ inputs });
  }
}

/* Fills in an image file as JSON for POST /predict. */
async function fill(form) {
  const [file] = form.elements.file.files;
  if (!file || !isJson(form.elements.type.value)) return;
  const bytes = new Uint8Array(await file.arrayBuffer());
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  form.elements.text.value = JSON.stringify({ images: [btoa(letters)] });
}

function buildRequest(form) {
  let path = form.dataset.path.slice(1);
  const query = new URLSearchParams();
  const headers = getHeaders();
  for (const input of form.querySelectorAll("[data-in]")) {
    if (input.value === "") continue;
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.dataset.in === "query") query.set(input.name, input.value);
    else headers[input.name] = input.value;
  }
  const request = { method: form.dataset.method, headers, credentials: "same-origin" };
  const type = form.elements.type?.value;
  if (type === "multipart/form-data") {
    request.body = new FormData(); // whose type the browser writes, with the boundary
    for (const file of form.elements.file.files) request.body.append("image", file);
  } else if (type) {
    headers["Content-Type"] = type;
    request.body = isJson(type) ? form.elements.text.value : form.elements.file.files[0];
  }
  const search = query.toString();
  return [`${path || "./"}${search && `?${search}`}`, request];
}

async function send(form) {
  const status = form.querySelector(".status");
  const [shown, picture] = [form.querySelector("pre"), form.querySelector("img")];
  const [path, request] = buildRequest(form);
  status.textContent = "Sending …";
  try {
    const began = performance.now();
    const answer = await fetch(path, request);
    const blob = await answer.blob();
    const milliseconds = performance.now() - began;
    const type = answer.headers.get("content-type") ?? "no content";
    const isImage = type.startsWith("image/");
    const text = isImage ? "" : format(await blob.text(), type);
    status.textContent = `${answer.status} ${answer.statusText} · ${type} · ${blob.size.toLocaleString("en")} bytes · ${milliseconds.toFixed(0)} ms`;
    URL.revokeObjectURL(picture.src);
    picture.hidden = !isImage;
    shown.hidden = isImage;
    if (isImage) picture.src = URL.createObjectURL(blob);
    else shown.textContent = text;
  } catch {
    status.textContent = "The server cannot be reached.";
    shown.hidden = picture.hidden = true;
  }
}

function format(text, type) {
  let lines = text;
  if (/json/.test(type)) lines = JSON.stringify(JSON.parse(text), null, 2);
  return lines.length > MAX_SHOWN ? `${lines.slice(0, MAX_SHOWN)}\n… and ${lines.length - MAX_SHOWN} characters more` : lines;
}

for (const form of document.querySelectorAll("form.try")) {
  adapt(form);
  form.elements.type?.addEventListener("change", () => {
    adapt(form);
    fill(form);
  });
  form.elements.file?.addEventListener("change", () => fill(form));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
}
document.getElementById("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  loadModel().catch(() => {});
});
loadModel().catch(() => {});
