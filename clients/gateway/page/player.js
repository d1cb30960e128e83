// Plays speech while it arrives, without a gap between chunks.
//
// Each chunk becomes an AudioBuffer that starts on the very sample on which the one before it ends. The context runs at
// the speech's own rate, so no chunk is resampled by itself, which would click at its edges. An AudioWorklet would do as
// well, but browsers offer it to secure pages only, and a phone reaches a gateway on the local network by plain http.

const FIRST_LEAD_S = 0.15; // the jitter buffer: audio that must be there before playback begins
const LONGEST_LEAD_S = 2;
const MARGIN_S = 0.02; // between asking for a start and the start

export class Player {
  constructor(context) {
    this.context = context;
    this.scheduled = []; // {frame, length}: when each chunk starts and how long it is, in samples of the context
    this.nUnderruns = 0;
    this.finished = new Promise((resolve) => { this.finish = resolve; });
    this.leadS = FIRST_LEAD_S;
    this.waiting = []; // Float32Array, not yet scheduled
    this.sources = new Set();
    this.nextFrame = 0; // where the next chunk starts
    this.isRefilling = true;
    this.hasEnded = false;
    this.wasStopped = false;
  }

  /** Take in a chunk: Float32Array, mono, -1..1, at the context's rate. */
  push(samples) {
    if (this.hasEnded) return;
    this.waiting.push(samples);
    this.schedule();
  }

  /** No chunk will follow. */
  end() {
    this.hasEnded = true;
    this.schedule();
    if (!this.sources.size) this.finish();
  }

  /** Be silent at once. */
  stop() {
    this.hasEnded = this.wasStopped = true;
    this.waiting = [];
    for (const source of this.sources) source.stop();
    this.finish();
  }

  /** Seconds of speech already heard. */
  get playedS() {
    const now = this.context.currentTime * this.context.sampleRate;
    const played = this.scheduled.map(({ frame, length }) => Math.min(Math.max(now - frame, 0), length));
    return sum(played) / this.context.sampleRate;
  }

  /** Seconds of speech that are here and not yet heard. */
  get bufferedS() {
    const n = sum(this.scheduled.map(({ length }) => length)) + this.nWaiting;
    return n / this.context.sampleRate - this.playedS;
  }

  get nWaiting() {
    return sum(this.waiting.map((samples) => samples.length));
  }

  schedule() {
    const soon = Math.ceil((this.context.currentTime + MARGIN_S) * this.context.sampleRate);
    if (this.nextFrame < soon && !this.isRefilling) { // it ran dry: wait for twice as much
      this.isRefilling = true;
      this.nUnderruns += 1;
      this.leadS = Math.min(2 * this.leadS, LONGEST_LEAD_S);
    }
    if (this.isRefilling) {
      const isEnough = this.nWaiting >= this.leadS * this.context.sampleRate;
      if (!this.waiting.length || !(isEnough || this.hasEnded)) return;
      this.isRefilling = false;
      this.nextFrame = soon;
    }
    for (const samples of this.waiting.splice(0)) this.start(samples);
  }

  start(samples) {
    const buffer = this.context.createBuffer(1, samples.length, this.context.sampleRate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.context.destination);
    source.onended = () => {
      this.sources.delete(source);
      if (this.hasEnded && !this.sources.size) this.finish();
    };
    source.start(this.nextFrame / this.context.sampleRate);
    this.sources.add(source);
    this.scheduled.push({ frame: this.nextFrame, length: samples.length });
    this.nextFrame += samples.length;
  }
}

function sum(numbers) {
  return numbers.reduce((a, b) => a + b, 0);
}
