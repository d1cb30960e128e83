// The speech as a picture that grows: what was heard, what is buffered, where playback is.

const BIN_S = 0.01; // a bar of the picture covers at least this much
const SHORTEST_S = 4; // of speech that the canvas shows

export class Waveform {
  constructor(canvas) {
    this.canvas = canvas;
    this.clear();
  }

  clear() {
    this.peaks = []; // of each BIN_S
    this.pending = { peak: 0, n: 0 };
    this.draw(0);
  }

  push(samples, sampleRate) {
    const size = Math.round(BIN_S * sampleRate);
    for (const sample of samples) {
      this.pending.peak = Math.max(this.pending.peak, Math.abs(sample));
      this.pending.n += 1;
      if (this.pending.n === size) {
        this.peaks.push(this.pending.peak);
        this.pending = { peak: 0, n: 0 };
      }
    }
  }

  /** playedS: how much of it has been heard. */
  draw(playedS) {
    const { canvas } = this;
    const style = getComputedStyle(canvas);
    const [accent, ahead, ink] = ["--accent", "--ahead", "--ink"].map((name) => style.getPropertyValue(name));
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    const nBins = Math.max(this.peaks.length, SHORTEST_S / BIN_S);
    const playedX = (playedS / BIN_S / nBins) * width;
    const step = 3; // pixels from bar to bar
    for (let x = 0; x < width; x += step) {
      const bins = this.peaks.slice(Math.floor((x / width) * nBins), Math.ceil(((x + step) / width) * nBins));
      if (!bins.length) break;
      const bar = Math.max(2, Math.sqrt(Math.min(1, Math.max(...bins))) * (height - 8)); // the root: nearer to loudness;
      pen.fillStyle = x < playedX ? accent : ahead;
      pen.fillRect(x, (height - bar) / 2, step - 1, bar);
    }
    if (playedS > 0) {
      pen.fillStyle = ink;
      pen.fillRect(Math.min(playedX, width - 1), 0, 1, height);
    }
  }
}
