// One request to the gateway: its chunks while they arrive, and what they add up to.

const AUDIBLE_PEAK = 10 ** (-50 / 20); // -50 dBFS, as in the other clients: quieter is silence to a listener

export class Speech {
  /** request: the JSON fields of /v1/audio/speech, without formats. */
  constructor(request) {
    this.request = request;
    this.chunks = []; // Float32Array
    this.nSamples = 0;
    this.sampleRate = 0; // Hz; known when it begins
    this.seed = null; // a string: 64 bits are more than a JavaScript number holds
    this.ttfaS = null; // from sending to the first audible chunk
    this.elapsedS = 0; // from sending to the last chunk
    this.wasCut = false; // stopped, or it broke off
    this.abort = new AbortController();
  }

  get durationS() {
    return this.sampleRate ? this.nSamples / this.sampleRate : 0;
  }

  get rtf() {
    return this.nSamples ? this.elapsedS / this.durationS : null;
  }

  /** Send the request and yield its chunks. Throws SpeechError; ends quietly when it is cancelled. */
  async *stream(key) {
    const sentAt = performance.now();
    try {
      const response = await this.send(key);
      this.sampleRate = Number(response.headers.get("x-sample-rate"));
      this.seed = response.headers.get("x-seed");
      for await (const samples of decodePcm(response.body)) {
        this.elapsedS = (performance.now() - sentAt) / 1000;
        if (this.ttfaS === null && isAudible(samples)) this.ttfaS = this.elapsedS;
        this.chunks.push(samples);
        this.nSamples += samples.length;
        yield samples;
      }
    } catch (error) {
      this.wasCut = true;
      if (this.abort.signal.aborted) return;
      if (error instanceof SpeechError) throw error;
      throw new SpeechError(this.sampleRate ? "The speech broke off." : "The gateway does not answer.", 0);
    }
  }

  /** Stop: the connection closes, which cancels the work on the server. */
  cancel() {
    this.abort.abort();
  }

  async send(key) {
    const response = await fetch("v1/audio/speech", {
      method: "POST",
      headers: { "content-type": "application/json", ...bearer(key) },
      body: JSON.stringify({ model: "bark", response_format: "pcm", ...this.request }),
      signal: this.abort.signal,
    });
    if (!response.ok) throw await SpeechError.of(response);
    return response;
  }

  /** The speech up to now as a WAV file. */
  wav() {
    const size = 2 * this.nSamples;
    const file = new DataView(new ArrayBuffer(44 + size));
    const ascii = (at, text) => [...text].forEach((letter, i) => file.setUint8(at + i, letter.charCodeAt(0)));
    ascii(0, "RIFF");
    file.setUint32(4, 36 + size, true);
    ascii(8, "WAVEfmt ");
    file.setUint32(16, 16, true);
    file.setUint16(20, 1, true); // PCM
    file.setUint16(22, 1, true); // mono
    file.setUint32(24, this.sampleRate, true);
    file.setUint32(28, 2 * this.sampleRate, true); // bytes a second
    file.setUint16(32, 2, true); // bytes a sample
    file.setUint16(34, 16, true); // bits a sample
    ascii(36, "data");
    file.setUint32(40, size, true);
    let at = 44;
    for (const chunk of this.chunks) {
      for (const sample of chunk) {
        file.setInt16(at, Math.round(sample * 32767), true);
        at += 2;
      }
    }
    return new Blob([file.buffer], { type: "audio/wav" });
  }
}

/** What the gateway refused, in its own words. status: HTTP's; 0: there was no answer. */
export class SpeechError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }

  static async of(response) {
    const body = await response.json().catch(() => null);
    return new SpeechError(body?.error?.message ?? `HTTP ${response.status}`, response.status);
  }
}

/** Names of the voices. Throws SpeechError. */
export async function fetchVoices(key) {
  const response = await fetch("v1/audio/voices", { headers: bearer(key) });
  if (!response.ok) throw await SpeechError.of(response);
  const { voices } = await response.json();
  return voices.filter((voice) => !voice.alias_of).map((voice) => voice.id);
}

function bearer(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** 16-bit little-endian samples out of a body whose pieces may end in the middle of one. */
async function* decodePcm(body) {
  const reader = body.getReader();
  let rest = new Uint8Array(0);
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    const bytes = new Uint8Array(rest.length + piece.value.length);
    bytes.set(rest);
    bytes.set(piece.value, rest.length);
    const nSamples = bytes.length >> 1;
    const view = new DataView(bytes.buffer);
    rest = bytes.slice(2 * nSamples);
    if (nSamples) yield Float32Array.from({ length: nSamples }, (_, i) => view.getInt16(2 * i, true) / 32767);
  }
}

function isAudible(samples) {
  return samples.some((sample) => Math.abs(sample) > AUDIBLE_PEAK);
}
