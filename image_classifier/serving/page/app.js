"use strict";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/bmp"]; // what the server decodes
const NUM_BARS = 10; // until somebody asks for all
const VIEWS = { one: "none", mirror: "2 views", six: "up to 6 views" };
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
  describe();
  showSamples().catch(() => say("The sample images cannot be loaded.", true));
  return true;
}

/* Shows the model's run, accuracy, input, classes, verdicts and card. */
function describe() {
  const { manifest, verdicts, card, image_size: size } = model;
  const facts = {
    run: `${model.experiment_name} / ${model.run_name}`,
    "test accuracy": manifest?.metrics?.num_images && `${percent(manifest.metrics.accuracy)} of ${manifest.metrics.num_images.toLocaleString("en")} images`,
    "test-time augmentation": VIEWS[model.views] ?? model.views,
    input: `${size} × ${size} pixels, RGB`,
    data: model.data_digest.slice(0, 12),
    "model file": manifest?.files && Object.keys(manifest.files).find((name) => name.endsWith(".onnx")),
  };
  find("about-facts").replaceChildren();
  for (const [name, value] of Object.entries(facts)) {
    if (value) {
      const pair = document.createElement("div");
      pair.append(makeElement("dt", name), makeElement("dd", value));
      find("about-facts").append(pair);
    }
  }
  find("classes-title").textContent = `Classes (${model.classes.length})`;
  find("classes").replaceChildren(...model.classes.map((name) => makeElement("li", name)));
  find("verdicts-title").textContent = `Verdicts about its run (${verdicts.length})`;
  find("verdicts").replaceChildren(...describeVerdicts(verdicts));
  find("card-details").hidden = card === null;
  find("card").replaceChildren(renderCard(card ?? ""));
  find("about").hidden = false;
}

function describeVerdicts(verdicts) {
  if (!verdicts.length) return [makeElement("p", "There are none. image_classifier verify RUN --attest adds one.")];
  const rows = verdicts.map((each) => [
    each.verdict,
    each.signer ?? "not checked",
    each.checked,
    each.processor_family,
    each.verified_at.slice(0, 10),
  ]);
  const words = "Each verdict is from someone who trained the run again. The server checked only the signatures of signers that its --policy names.";
  return [
    makeElement("p", words, { class: "soft" }),
    makeTable("Verdicts", ["verdict", "signed by", "trained again", "processor", "date"], rows),
  ];
}

/* The sample images lie side by side in one picture; the manifest names their classes. */
async function showSamples() {
  const samples = model.manifest?.samples ?? [];
  find("samples").hidden = samples.length === 0;
  if (!samples.length) return;
  const answer = await ask("samples.png");
  if (!answer.ok) throw new Error();
  const strip = await createImageBitmap(await answer.blob());
  const side = model.image_size;
  const items = samples.map((sample, number) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = side;
    canvas.getContext("2d").drawImage(strip, number * side, 0, side, side, 0, 0, side, side);
    const button = makeElement("button", "", { type: "button", "aria-label": `Sample image ${number + 1}: ${sample.class}` });
    button.append(canvas, makeElement("span", sample.class));
    button.addEventListener("click", () => canvas.toBlob((blob) => classify(blob, sample.class), "image/png"));
    const item = document.createElement("li");
    item.append(button);
    return item;
  });
  find("sample-list").replaceChildren(...items);
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

/* Classifies a file; of a sample image the true class is known. */
async function classify(file, trueClass = null) {
  const turn = ++latest;
  pending = [file, trueClass];
  try {
    if (model === null && !(await loadModel())) {
      say("Enter the key; the image is kept until then.");
      find("key").focus();
      return;
    }
    say("Classifying …");
    const body = await convert(file).catch(() => {
      throw new Error(`The browser cannot read ${file.name || "this file"} as an image.`);
    });
    const began = performance.now();
    const answer = await ask(`predict?show_input=true&top_k=${model.classes.length}`, {
      method: "POST",
      headers: { "Content-Type": body.type },
      body,
    });
    const document_ = await answer.json();
    const milliseconds = performance.now() - began;
    if (turn !== latest) return; // a newer image replaced this one
    if (answer.status === 401) {
      model = null;
      find("key-form").hidden = false;
    }
    if (!answer.ok) throw new Error(`${document_.title}: ${document_.detail}`);
    pending = null;
    show(file, document_, milliseconds, trueClass);
  } catch (error) {
    if (turn === latest) {
      find("result").hidden = true;
      say(error instanceof TypeError ? "The server cannot be reached." : error.message, true);
    }
  }
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function show(file, answer, milliseconds, trueClass) {
  const [prediction] = answer.predictions;
  const picture = find("picture");
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  draw(prediction.input);
  find("answer").textContent = `${prediction.class}, ${percent(prediction.probability)}`;
  find("truth").hidden = trueClass === null;
  find("truth").textContent = trueClass === prediction.class ? "✓ This is its true class." : `✗ Its true class is ${trueClass}.`;
  find("bars").replaceChildren(...prediction.top_k.map(buildBar));
  expand(false);
  find("all").hidden = prediction.top_k.length <= NUM_BARS;
  find("facts").textContent = `model version ${answer.model_version} · answered in ${milliseconds.toFixed(0)} ms`;
  find("result").hidden = false;
  say("");
  find("answer").focus({ preventScroll: false });
}

function buildBar(score) {
  const item = document.createElement("li");
  const track = makeElement("span", "", { class: "track" });
  const bar = makeElement("span", "", { class: "bar" });
  bar.style.width = `${100 * score.probability}%`;
  track.append(bar);
  const share = makeElement("span", percent(score.probability), { class: "share" });
  item.append(makeElement("span", score.class, { class: "name" }), track, share);
  return item;
}

/* Shows the bars of all classes, or of the most probable ones. */
function expand(isAll) {
  [...find("bars").children].forEach((item, number) => (item.hidden = !isAll && number >= NUM_BARS));
  find("all").setAttribute("aria-expanded", String(isAll));
  find("all").textContent = isAll ? `Show the first ${NUM_BARS}` : `Show all ${model.classes.length} classes`;
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
  else say("This is not an image.", true);
}

for (const [button, input] of [["choose", "file"], ["photograph", "camera"]]) {
  find(button).addEventListener("click", () => find(input).click());
  find(input).addEventListener("change", (event) => {
    if (event.target.files.length) take(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
}

find("all").addEventListener("click", () => expand(find("all").getAttribute("aria-expanded") === "false"));

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
      if (pending) classify(...pending);
    } else {
      say("The server does not accept this key.", true);
    }
  } catch (error) {
    say(error.message, true);
  }
});

loadModel().catch(() => say("The server cannot be reached.", true));
