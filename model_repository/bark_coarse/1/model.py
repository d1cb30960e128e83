"""Triton model bark_coarse: the next tokens of many streams' coarse stage at once. All of it is in barkstream.bls.CausalStage."""

from barkstream.bls import CausalStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = CausalStage("coarse", args)

    def execute(self, requests):
        return self.stage.execute(requests)
