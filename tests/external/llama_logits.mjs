// Run by Node in a folder that has node-llama-cpp: what llama.cpp predicts after each token of a text.
//
//     node llama_logits.mjs MODEL.gguf IDS.json OUT.json
//
// IDS.json is a list of token ids. OUT.json is a list for each of them: [[token, probability], ..], all of the vocabulary.

import fs from "fs";
import {createRequire} from "module";
import {pathToFileURL} from "url";

const [, , model, idsFile, out] = process.argv;
const require = createRequire(pathToFileURL(process.cwd() + "/"));
const {getLlama} = await import(pathToFileURL(require.resolve("node-llama-cpp")).href);
const ids = JSON.parse(fs.readFileSync(idsFile));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const loaded = await llama.loadModel({modelPath: model});
const context = await loaded.createContext({contextSize: 256, threads: 1});
// Without a temperature nothing is cut off: the probabilities are those of the whole vocabulary.
const next = {generateNext: {probabilities: true, token: true, options: {temperature: 0}}};
const results = await context.getSequence().controlledEvaluate(ids.map((id) => [id, next]));
fs.writeFileSync(out, JSON.stringify(results.map((result) => [...result.next.probabilities.entries()])));
process.exit(0);
