"use strict";

/* Renders a model card's Markdown as elements. Text is never parsed as HTML, and links stay plain text. */

function makeElement(tag, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function makeTable(label, heading, rows) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  heading.forEach((cell) => head.append(withInlines(makeElement("th", "", { scope: "col" }), cell)));
  const body = table.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    row.forEach((cell) => withInlines(line.insertCell(), cell));
  }
  const frame = makeElement("div", "", { class: "scroll", tabindex: "0", role: "group", "aria-label": label });
  frame.append(table);
  return frame;
}

/* Renders code between backticks, and removes the backslash before an escaped character. */
function withInlines(element, text) {
  for (const part of text.split(/(`[^`]*`)/)) {
    if (/^`[^`]*`$/.test(part)) element.append(makeElement("code", part.slice(1, -1)));
    else element.append(part.replace(/\\([!-/:-@[-`{-~])/g, "$1"));
  }
  return element;
}

function splitRow(line) {
  const cells = line.trim().slice(1).split(/(?<!\\)\|/);
  return cells.slice(0, -1).map((cell) => cell.trim());
}

function renderCard(markdown, level = 3) {
  const fragment = document.createDocumentFragment();
  const lines = markdown.replace(/^---\n[\s\S]*?\n---\n/, "").split("\n");
  let title = "Model card";
  for (let start = 0, end; start < lines.length; start = end) {
    const line = lines[start];
    const take = (belongs) => {
      while (end < lines.length && belongs(lines[end])) end++;
    };
    end = start + 1;
    const heading = /^(#+) (.*)/.exec(line);
    if (line.trim() === "") continue;
    if (heading) {
      const element = withInlines(document.createElement(`h${heading[1].length === 1 ? level : level + 1}`), heading[2]);
      title = element.textContent;
      fragment.append(element);
    } else if (line.startsWith("```")) {
      take((each) => !each.startsWith("```"));
      const block = makeElement("pre", "", { tabindex: "0", role: "group", "aria-label": `${title}: code` });
      block.append(makeElement("code", lines.slice(start + 1, end).join("\n")));
      fragment.append(block);
      end++;
    } else if (line.startsWith("|")) {
      take((each) => each.startsWith("|"));
      const rows = lines.slice(start, end).map(splitRow);
      fragment.append(makeTable(`${title}: ${rows[0].join(", ")}`, rows[0], rows.slice(2)));
    } else if (line.startsWith("- ")) {
      take((each) => each.startsWith("- "));
      const list = document.createElement("ul");
      lines.slice(start, end).forEach((each) => list.append(withInlines(document.createElement("li"), each.slice(2))));
      fragment.append(list);
    } else {
      take((each) => each.trim() !== "" && !/^(#|```|\||- )/.test(each));
      fragment.append(withInlines(document.createElement("p"), lines.slice(start, end).join(" ")));
    }
  }
  return fragment;
}
