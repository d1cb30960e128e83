"""Triton model bark_semantic: the next tokens of many streams' semantic stage at once. All of it is in barkstream.bls.CausalStage."""

from barkstream.bls import CausalStage


class TritonPythonModel:
    def initialize(self, args):
        self.stage = CausalStage("semantic", args)

    def execute(self, requests):
        return self.stage.execute(requests)
