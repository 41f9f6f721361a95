"""mask_tokens.py - what MAE is compared with in its Table 1(c): mask tokens in the encoder, too.

    python tests/mask_tokens.py --out runs/mask_tokens    (flags of mae_image.py)

A hidden patch becomes a learned vector before the encoder instead of after it. So the encoder works
on all N tokens (slower), and meets in pretraining what it never meets afterwards (worse: -13.9 points
in the linear probe). finetune.py takes the checkpoint.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mae_image  # noqa: E402
from masking import hidden, restore, run_script, visible  # noqa: E402


class MAEWithMaskTokens(mae_image.MAE):
    """As MAE, except for where the mask token comes in; it is D wide here."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mask_token = nn.Parameter(torch.zeros_like(self.cls_token))
        nn.init.normal_(self.mask_token, std=0.02)

    def forward_encoder(self, imgs, mask=None):
        x = self.patch_embed(visible(self.patches(imgs), mask))  # (B, K, D)
        if mask is not None:
            x = restore(x, mask, self.mask_token)  # (B, N, D)
        x = x + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+N, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_decoder(self, latent, mask):
        x = self.decoder_embed(latent)  # (B, 1+N, E)
        x = torch.cat([x[:, :1], x[:, 1:] + self.decoder_pos_embed], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(hidden(self.decoder_norm(x)[:, 1:], mask))


if __name__ == "__main__":
    mae_image.MAE = MAEWithMaskTokens
    run_script(mae_image.main)
