"""Top-p routing (Huang et al. 2024, arXiv:2403.07652): more experts where the router is less sure.

The answer to exercise 6. top_k is the most experts that a token may have.
"""

import lamoe

P = 0.7


class TopP(lamoe.Router):
    def forward(self, x_BTD, ids_BT):
        c, probs_NE = self.config, self.logits(x_BTD).softmax(-1)
        experts_NA = lamoe.choose(probs_NE, c.top_k)
        probs_NA = probs_NE.gather(1, experts_NA)
        kept_NA = probs_NA.cumsum(-1) - probs_NA < P  # those before have not reached P
        weights_NA = probs_NA * kept_NA
        weights_NA = weights_NA / weights_NA.sum(-1, keepdim=True)
        load_E = self.load(experts_NA.masked_fill(~kept_NA, -1))  # -1 is no expert
        load_E = load_E / load_E.sum()
        balance = c.balance_weight * lamoe.balance_loss(probs_NE, load_E)
        return lamoe.Routing(experts_NA, weights_NA, probs_NE, load_E, balance)


lamoe.ROUTERS["top_p"] = TopP
