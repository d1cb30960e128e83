"""Triton model bark_fine on the cuda engine: windows of many streams filled at once. All of it is in barkstream.bls.FineStage."""

from barkstream.bls import FineStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = FineStage(args)

    def execute(self, requests):
        return self.stage.execute(requests)
