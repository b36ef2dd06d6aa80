"""Hash routing (Roller et al. 2021, arXiv:2106.04426): a token's experts follow from its id alone.

Nothing is learned, so nothing collapses: how even the load is, is up to the text.
"""

import torch

import lamoe


class Hash(lamoe.Router):
    def __init__(self, c):
        super().__init__(c)
        del self.weight  # no parameters

    def forward(self, x_BTD, ids_BT):
        c, mixed_N1 = self.config, ids_BT.reshape(-1, 1) * 2654435761 % 2**32 // 2**16
        experts_NA = (mixed_N1 + torch.arange(c.top_k, device=ids_BT.device)) % c.n_experts
        weights_NA = torch.full(experts_NA.shape, 1 / c.top_k, device=ids_BT.device)
        return lamoe.Routing(experts_NA, weights_NA)


lamoe.ROUTERS["hash"] = Hash
