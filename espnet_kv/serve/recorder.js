// Resamples the microphone to the rate of the model and posts pieces of 0.1 s. Firefox does not
// connect a microphone to an AudioContext of another rate, so the browser cannot do it.
"use strict";

const ZEROS = 16; // zero crossings of the filter on each side

class Recorder extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.step = sampleRate / rate; // samples of the microphone per sample of the model
    this.reach = Math.ceil(ZEROS * Math.max(1, this.step));
    this.input = new Float32Array(this.reach); // samples that the filter still needs
    this.next = this.reach; // place of the next sample of the model in the input
    this.pending = [];
    this.size = Math.round(rate / 10);
    this.isOver = false;
    this.port.onmessage = () => {
      this.isOver = true;
      this.post();
      this.port.postMessage(null);
    };
  }

  process([channels]) {
    if (this.isOver) return false;
    if (!channels.length) return true;
    const input = new Float32Array(this.input.length + channels[0].length);
    input.set(this.input);
    channels[0].forEach((_, n) => {
      const sum = channels.reduce((total, channel) => total + channel[n], 0);
      input[this.input.length + n] = sum / channels.length;
    });
    for (; this.next + this.reach < input.length; this.next += this.step)
      this.pending.push(this.filtered(input));
    const used = Math.max(0, Math.floor(this.next) - this.reach);
    this.input = input.slice(used);
    this.next -= used;
    if (this.pending.length >= this.size) this.post();
    return true;
  }

  // The sample at `next`, by a sinc filter with a Hann window.
  filtered(input) {
    const cutoff = Math.min(1, 1 / this.step);
    let sum = 0;
    for (let n = Math.ceil(this.next - this.reach); n <= this.next + this.reach; n++) {
      const time = n - this.next;
      const x = Math.PI * cutoff * time;
      const sinc = x === 0 ? 1 : Math.sin(x) / x;
      const window = 0.5 + 0.5 * Math.cos((Math.PI * time) / this.reach);
      sum += input[n] * cutoff * sinc * window;
    }
    return sum;
  }

  post() {
    this.port.postMessage(Float32Array.from(this.pending));
    this.pending = [];
  }
}

registerProcessor("recorder", Recorder);
