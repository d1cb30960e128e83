"""Triton model bark: text in, speech streamed out. All of it is in barkstream.bls.Speaker."""

from barkstream.bls import Speaker


class TritonPythonModel:
    def initialize(self, args):
        self.speaker = Speaker(args)

    def execute(self, requests):
        for request in requests:
            self.speaker.submit(request)  # decoupled: returns at once, a worker sends the chunks

    def finalize(self):
        self.speaker.close()
