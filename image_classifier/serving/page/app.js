"use strict";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/bmp"]; // what the server decodes
const find = (id) => document.getElementById(id);
let model = null;
let key = "";
let pending = null; // the image that waits for a key
let latest = 0;

function say(text, isBad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", isBad);
}

function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  return fetch(path, { ...options, headers, credentials: "same-origin" });
}

async function loadModel() {
  const answer = await ask("model");
  if (answer.status === 401) {
    find("key-form").hidden = false;
    find("model").textContent = "";
    return false;
  }
  if (!answer.ok) throw new Error((await answer.json()).detail);
  model = await answer.json();
  find("key-form").hidden = true;
  const [, height, width] = model.input.shape;
  const seen = find("seen");
  [seen.width, seen.height] = [width, height];
  seen.setAttribute("aria-label", `The image as the network sees it, ${width} by ${height} pixels`);
  find("seen-caption").textContent = `as the network sees it, ${width} × ${height}`;
  find("model").textContent = `${model.name} · version ${model.version} · ${model.classes.length} classes`;
  return true;
}

/* Images of other types than the server takes are drawn by the browser and sent as PNG. */
async function convert(file) {
  if (TYPES.includes(file.type)) return file;
  const bitmap = await createImageBitmap(file);
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [bitmap.width, bitmap.height];
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve, reject) =>
    canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error("cannot be drawn"))), "image/png"),
  );
}

async function classify(file) {
  const turn = ++latest;
  pending = file;
  try {
    if (model === null && !(await loadModel())) {
      say("Enter the key; the image is kept until then.");
      find("key").focus();
      return;
    }
    say("Looking …");
    const body = await convert(file).catch(() => {
      throw new Error(`${file.name || "this"} is no image that the browser can read`);
    });
    const began = performance.now();
    const answer = await ask(`predict?show_input=true&top_k=${model.classes.length}`, {
      method: "POST",
      headers: { "Content-Type": body.type },
      body,
    });
    const document_ = await answer.json();
    const milliseconds = performance.now() - began;
    if (turn !== latest) return; // another image was given meanwhile
    if (answer.status === 401) {
      model = null;
      find("key-form").hidden = false;
    }
    if (!answer.ok) throw new Error(`${document_.title}: ${document_.detail}`);
    pending = null;
    show(file, document_, milliseconds);
  } catch (error) {
    if (turn === latest) {
      find("result").hidden = true;
      say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
    }
  }
}

function show(file, answer, milliseconds) {
  const [prediction] = answer.predictions;
  const picture = find("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  draw(prediction.input);
  const percent = (share) => `${(100 * share).toFixed(1)} %`;
  find("answer").textContent = `${prediction.class}, ${percent(prediction.probability)}`;
  find("bars").replaceChildren(
    ...prediction.top_k.map((score) => {
      const item = document.createElement("li");
      for (const [kind, text] of [["name", score.class], ["track", ""], ["share", percent(score.probability)]]) {
        const part = document.createElement("span");
        part.className = kind;
        part.textContent = text;
        item.append(part);
      }
      const bar = document.createElement("span");
      bar.className = "bar";
      bar.style.width = `${100 * score.probability}%`;
      item.children[1].append(bar);
      return item;
    }),
  );
  find("facts").textContent = `model version ${answer.model_version} · answered in ${milliseconds.toFixed(0)} ms`;
  find("result").hidden = false;
  say("");
  find("answer").focus({ preventScroll: false });
}

function draw(base64) {
  const bytes = atob(base64);
  const seen = find("seen");
  const image = new ImageData(seen.width, seen.height);
  for (let pixel = 0; pixel < seen.width * seen.height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * pixel + channel] = bytes.charCodeAt(3 * pixel + channel);
    }
    image.data[4 * pixel + 3] = 255;
  }
  seen.getContext("2d").putImageData(image, 0, 0);
}

function take(files) {
  const file = [...files].find((each) => each.type.startsWith("image/"));
  if (file) classify(file);
  else say("That is no image.", true);
}

for (const [button, input] of [["choose", "file"], ["photograph", "camera"]]) {
  find(button).addEventListener("click", () => find(input).click());
  find(input).addEventListener("change", (event) => {
    if (event.target.files.length) take(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
}

const drop = find("drop");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});

find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = find("key").value.trim();
  try {
    if (await loadModel()) {
      say("");
      if (pending) classify(pending);
    } else {
      say("This key is not known here.", true);
    }
  } catch (error) {
    say(error.message, true);
  }
});

loadModel().catch(() => say("The server cannot be reached.", true));
