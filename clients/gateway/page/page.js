// The page: the form asks for speech, the player plays it, the history keeps it.

import { Player } from "./player.js";
import { Speech, fetchVoices } from "./speech.js";
import { Waveform } from "./waveform.js";

const USUAL_RATE = 24000; // Hz: Bark's; a checkpoint with another one says so when the speech begins
const element = (id) => document.getElementById(id);
const waveform = new Waveform(element("waveform"));

/** What is being spoken, or was last: for the tests, too. */
export const now = { speech: null, player: null };
let context = null;

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  speak(new Speech(readForm()));
});
element("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("form").requestSubmit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop();
});
element("stop").addEventListener("click", stop);
element("download").addEventListener("click", () => download(now.speech));
element("key").addEventListener("change", listVoices);
listVoices();

/** The fields that are filled in, as the API names them. */
function readForm() {
  const filled = {};
  for (const name of ["seed", "temperature"]) {
    if (element(name).value) filled[name] = Number(element(name).value);
  }
  if (element("voice").value) filled.voice = element("voice").value;
  return { input: element("text").value, ...filled };
}

/** Ask for speech and play it as it comes. */
async function speak(speech) {
  stop();
  let player = begin(speech, USUAL_RATE);
  showError("");
  showState("Waiting for the first audio …");
  try {
    for await (const samples of speech.stream(element("key").value)) {
      if (speech.sampleRate !== player.context.sampleRate) player = begin(speech, speech.sampleRate);
      if (speech.ttfaS !== null) showState(`Speaking, first audio after ${milliseconds(speech.ttfaS)}.`);
      waveform.push(samples, speech.sampleRate);
      player.push(samples);
    }
  } catch (error) {
    if (error.status === 401) askForKey();
    showError(error.message);
  }
  if (speech.nSamples) addToHistory(speech);
  player.end();
  await end(speech, player);
}

/** Play a speech of the history again. */
async function replay(speech) {
  stop();
  const player = begin(speech, speech.sampleRate);
  showState("Playing again.");
  for (const samples of speech.chunks) {
    waveform.push(samples, speech.sampleRate);
    player.push(samples);
  }
  player.end();
  await end(speech, player);
}

/** Cancel what is being made, and be silent. */
function stop() {
  if (!now.player || element("stop").disabled) return;
  now.speech.cancel();
  now.player.stop();
}

/** A player for `speech`, which is now the one that the page shows. */
function begin(speech, sampleRate) {
  if (context?.sampleRate !== sampleRate) context = new AudioContext({ sampleRate });
  context.resume(); // allowed, for the listener has just pressed a button
  const player = new Player(context);
  Object.assign(now, { speech, player });
  waveform.clear();
  element("stop").disabled = false;
  requestAnimationFrame(() => refresh(speech, player));
  return player;
}

/** Wait until playback is over and say so. */
async function end(speech, player) {
  await player.finished;
  if (now.player !== player) return;
  refresh(speech, player);
  if (document.activeElement === element("stop")) element("speak").focus();
  element("stop").disabled = true;
  if (player.wasStopped) showState("Stopped.");
  else if (!speech.nSamples) showState("Nothing was spoken.");
  else showState(`${speech.wasCut ? "Broke off after" : "Done:"} ${seconds(speech.durationS)} of speech.`);
}

/** Show where things are, until this speech is over. */
function refresh(speech, player) {
  if (now.player !== player) return;
  waveform.draw(player.playedS);
  element("ttfa").textContent = milliseconds(speech.ttfaS);
  element("rtf").textContent = speech.rtf === null ? "–" : speech.rtf.toFixed(2);
  element("buffered").textContent = seconds(Math.max(0, player.bufferedS));
  element("length").textContent = seconds(speech.durationS);
  element("underruns").textContent = player.nUnderruns;
  element("used-seed").textContent = speech.seed ?? "–";
  element("download").disabled = !speech.nSamples;
  if (!element("stop").disabled) requestAnimationFrame(() => refresh(speech, player));
}

function addToHistory(speech) {
  const entry = element("entry").content.cloneNode(true);
  const { input, voice } = speech.request;
  const shown = input.length > 200 ? `${input.slice(0, 200)} …` : input;
  entry.querySelector(".said").textContent = shown;
  const facts = [voice ?? "Bark's own voice", `seed ${speech.seed}`, seconds(speech.durationS)];
  facts.push(`first audio ${milliseconds(speech.ttfaS)}`, `RTF ${speech.rtf.toFixed(2)}`);
  if (speech.wasCut) facts.push("cut short");
  entry.querySelector(".hint").textContent = facts.join(" · ");
  const actions = { play: () => replay(speech), save: () => download(speech), reuse: () => reuse(speech) };
  for (const [name, act] of Object.entries(actions)) {
    const button = entry.querySelector(`.${name}`);
    button.addEventListener("click", act);
    button.setAttribute("aria-label", `${button.textContent}: ${shown.slice(0, 60)}`);
  }
  element("nothing-yet").hidden = true;
  element("history").prepend(entry);
}

/** Put an old speech's request back into the form, with the seed that it was given. */
function reuse(speech) {
  const { input, voice, temperature } = speech.request;
  element("text").value = input;
  element("voice").value = voice ?? "";
  element("temperature").value = temperature ?? "";
  element("seed").value = speech.seed;
  element("text").focus();
}

function download(speech) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(speech.wav());
  link.download = `barkstream-${speech.seed}.wav`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // a slow browser may still be reading it
}

async function listVoices() {
  try {
    const names = await fetchVoices(element("key").value);
    const [bark] = element("voice").options;
    element("voice").replaceChildren(bark, ...names.map((name) => new Option(name)));
    showError("");
  } catch (error) {
    if (error.status === 401) askForKey();
    showError(error.message);
  }
}

function askForKey() {
  element("key-field").hidden = false;
  element("key").focus();
}

/** In a live region, so a sentence is set only once: a screen reader reads it each time. */
function showState(sentence) {
  if (element("state").textContent !== sentence) element("state").textContent = sentence;
}

function showError(sentence) {
  element("error").textContent = sentence;
}

function seconds(s) {
  return `${s.toFixed(1)} s`;
}

function milliseconds(s) {
  return s === null ? "–" : `${Math.round(s * 1000)} ms`;
}
