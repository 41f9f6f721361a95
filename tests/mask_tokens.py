"""mask_tokens.py - what MAE is compared with in its Table 1(c): mask tokens in the encoder, too.

    python tests/mask_tokens.py --out runs/mask_tokens    (flags of mae_image.py)

So the encoder works on all N tokens (slower), and meets in pretraining what it never meets
afterwards (worse: -13.9 points in the linear probe). finetune.py takes the checkpoint.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mae_image  # noqa: E402
import masking  # noqa: E402


class MAEWithMaskTokens(mae_image.MAE):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.mask_token = torch.nn.Parameter(0.02 * torch.randn_like(self.cls_token))  # D wide

    def forward_encoder(self, imgs, mask=None):
        x = self.patch_embed(masking.visible(self.patches(imgs), mask))  # (B, K, D)
        x = x if mask is None else masking.restore(x, mask, self.mask_token)  # (B, N, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x + self.pos_embed], dim=1)
        return self.norm(self.blocks(x))

    def forward_decoder(self, latent, mask):
        x = self.decoder_embed(latent)  # (B, 1+N, E)
        x = torch.cat([x[:, :1], x[:, 1:] + self.decoder_pos_embed], dim=1)
        x = self.decoder_norm(self.decoder_blocks(x))[:, 1:]
        return self.decoder_pred(masking.hidden(x, mask))


if __name__ == "__main__":
    mae_image.MAE = MAEWithMaskTokens
    masking.run_script(mae_image.main)
