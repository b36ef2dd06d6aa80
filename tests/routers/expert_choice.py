"""Expert choice (Zhou et al. 2022, arXiv:2202.09368): each expert takes the tokens it scores best.

Every expert takes as many, top_k for each token on average, so no loss has to keep a balance. But
it compares tokens of a batch: what one gets depends on later ones, and alone, as in generation, a
token gets every expert. It trains well, and is no language model: the test of causality says so.
"""

import torch

import lamoe


class ExpertChoice(lamoe.Router):
    def forward(self, x_BTD, ids_BT):
        c, probs_NE = self.config, self.logits(x_BTD).softmax(-1)
        tokens_CE = probs_NE.topk(-(-len(probs_NE) * c.top_k // c.n_experts), dim=0).indices
        taken_NE = torch.zeros_like(probs_NE).scatter(0, tokens_CE, 1.0)
        weights_NE, experts_NE = (probs_NE * taken_NE).sort(descending=True)
        return lamoe.Routing(experts_NE, weights_NE, probs_NE)  # those not taken have weight 0


lamoe.ROUTERS["expert_choice"] = ExpertChoice
