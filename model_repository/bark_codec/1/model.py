"""Triton model bark_codec on the cuda engine: chunks of many streams decoded at once. All of it is in barkstream.bls.CodecStage."""

from barkstream.bls import CodecStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = CodecStage(args)

    def execute(self, requests):
        return self.stage.execute(requests)
