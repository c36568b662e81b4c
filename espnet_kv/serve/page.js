// Sends a microphone or a recording to the server and shows what comes back.
"use strict";

const UNSURE = 0.5; // words with a lower confidence are underlined
const SEND_AHEAD = 1 << 18; // bytes of a recording in the browser's buffer
const element = (id) => document.getElementById(id);

let health = null; // the server's, from the last answer
let stop = null; // ends the open stream; null: there is none

function say(text, isProblem = false) {
  element("status").textContent = text;
  element("status").classList.toggle("problem", isProblem);
}

function kilobytes(count) {
  return `${(count / 1000).toLocaleString("en", { maximumFractionDigits: 1 })} kB`;
}

async function ask() {
  try {
    health = await (await fetch("health")).json();
  } catch {
    health = null;
    element("model").textContent = "The server does not answer";
    return;
  }
  const model = health.model;
  element("model").textContent =
    `Model ${model.name}, ${model.sample_rate} Hz, chunks of ${Math.round(1000 * model.chunk_seconds)} ms`;
  element("token-field").hidden = !health.token;
  element("held").textContent = kilobytes(health.cache_bytes);
  element("allocated").textContent = kilobytes(health.cache_capacity_bytes);
  element("streams").textContent = `${health.streams} of ${health.max_streams}`;
}

function row(parent, result) {
  const time = document.createElement("time");
  time.textContent = `${result.start_time.toFixed(2)}–${result.end_time.toFixed(2)} s`;
  const text = document.createElement("span");
  if (!result.words.length) text.textContent = result.text;
  for (const { word, start, end, confidence } of result.words) {
    const span = document.createElement("span");
    span.textContent = word;
    span.title = `${start.toFixed(2)} to ${end.toFixed(2)} s, confidence ${confidence.toFixed(2)}`;
    span.classList.toggle("unsure", confidence < UNSURE);
    if (text.childNodes.length) text.append(" ");
    text.append(span);
  }
  parent.replaceChildren(time, text);
}

function show(result) {
  element("audio").textContent = `${result.end_time.toFixed(1)} s`;
  element("latency").textContent = `${Math.round(1000 * result.latency)} ms`;
  element("partial").replaceChildren();
  if (!result.text) return;
  element("empty").hidden = true;
  if (!result.is_final) return row(element("partial"), result);
  const item = document.createElement("li");
  row(item, result);
  element("segments").append(item);
}

// A websocket that is open, or an error that says why the server refused it.
function connect() {
  const address = new URL(".", location.href);
  address.protocol = location.protocol.replace("http", "ws");
  if (element("token").value) address.searchParams.set("token", element("token").value);
  const socket = new WebSocket(address);
  return new Promise((resolve, reject) => {
    socket.onopen = () => resolve(socket);
    socket.onclose = async () => {
      await ask();
      if (!health) reject(new Error("The server does not answer"));
      else if (health.streams >= health.max_streams)
        reject(new Error("All streams of the server are in use; try again later"));
      else reject(new Error(health.token ? "The token is wrong" : "The server refused the stream"));
    };
  });
}

// Runs a stream. `send` gets the socket, sends audio and resolves with a function that ends the
// audio; that sends Done.
async function run(send, doing) {
  element("microphone").disabled = element("file").disabled = true;
  element("segments").replaceChildren();
  element("partial").replaceChildren();
  say("");
  let problem = "";
  let halt = () => {};
  try {
    if (!health) await ask();
    if (!health) throw new Error("The server does not answer");
    const socket = await connect();
    const closed = new Promise((resolve) => {
      socket.onmessage = ({ data }) => {
        if (data === "Done!") return socket.close();
        const result = JSON.parse(data);
        if (result.error) problem = result.error;
        else show(result);
      };
      socket.onclose = ({ code, reason }) => {
        if (code !== 1000 && code !== 1005) problem ||= reason || "The connection broke";
        resolve();
      };
    });
    say(doing);
    try {
      halt = await send(socket);
      stop = () => {
        element("stop").disabled = true;
        halt();
      };
      element("stop").disabled = false;
    } catch (error) {
      socket.close();
      throw error;
    }
    await closed;
    halt();
  } catch (error) {
    problem = error.message;
  }
  stop = null;
  element("stop").disabled = true;
  element("microphone").disabled = element("file").disabled = false;
  element("file").value = "";
  say(problem || "The stream has ended", Boolean(problem));
}

async function sendMicrophone(socket) {
  if (!navigator.mediaDevices)
    throw new Error("Browsers give the microphone to pages of localhost and of https only");
  // models are trained on recordings without this processing
  const audio = { channelCount: 1, echoCancellation: false, noiseSuppression: false };
  const media = await navigator.mediaDevices.getUserMedia({ audio });
  const context = new AudioContext();
  await context.audioWorklet.addModule("recorder.js");
  const recorder = new AudioWorkletNode(context, "recorder", {
    processorOptions: { rate: health.model.sample_rate },
  });
  recorder.port.onmessage = ({ data }) => {
    if (socket.readyState !== WebSocket.OPEN) return;
    socket.send(data ?? "Done"); // null: the last samples were sent
  };
  context.createMediaStreamSource(media).connect(recorder).connect(context.destination);
  await context.resume();
  let isOver = false;
  return () => {
    if (isOver) return;
    isOver = true;
    recorder.port.postMessage("end");
    for (const track of media.getTracks()) track.stop();
    setTimeout(() => context.close(), 1000); // the worklet has answered by then
  };
}

async function sendFile(socket, file) {
  const rate = health.model.sample_rate;
  let audio;
  try {
    audio = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name}: the browser cannot decode this file`);
  }
  const samples = new Float32Array(audio.length);
  for (let channel = 0; channel < audio.numberOfChannels; channel++)
    audio.getChannelData(channel).forEach((value, n) => {
      samples[n] += value / audio.numberOfChannels;
    });
  let isOver = false;
  (async () => {
    for (let start = 0; start < samples.length && !isOver; start += rate / 2) {
      while (socket.bufferedAmount > SEND_AHEAD && !isOver)
        await new Promise((resolve) => setTimeout(resolve, 50));
      if (socket.readyState !== WebSocket.OPEN) return;
      socket.send(samples.slice(start, start + rate / 2));
    }
    if (socket.readyState === WebSocket.OPEN) socket.send("Done");
  })();
  return () => {
    isOver = true;
  };
}

element("microphone").onclick = () => run(sendMicrophone, "Listening");
element("stop").onclick = () => stop?.();
element("file").onchange = ({ target }) => {
  const [file] = target.files;
  if (file) run((socket) => sendFile(socket, file), `Sending ${file.name}`);
};
ask();
setInterval(() => document.hidden || ask(), 1000);
