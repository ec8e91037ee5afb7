"""The baseline of benchmarks/gpu.py: one GPU's share of the published DiffusionNFT loop, by its facts.

What it does, as published (arXiv 2509.16117 and its code's GenEval recipe): a float32 transformer under float16
autocast; two peft adapters on it, `default` (trained) and `old` (samples), switched, the reference with both off;
nothing merged, nothing compiled; 9 images per forward, in sampling and in training; per training time three forwards
(old, reference, policy) and one backward, scaled against underflow; a float32 VAE; AdamW that is not fused. The
mathematics (solver, loss) are nft_ray's own, which match the published numbers; text is encoded beforehand.

What it leaves out would slow it further: rewards on the same GPU, an all-reduce in every backward, data loading.
"""

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from peft import LoraConfig, get_peft_model

from nft_ray.algorithms.nft import nft_loss
from nft_ray.flow.path import interpolate
from nft_ray.flow.solvers import solve
from nft_ray.models.sd3 import LORA_TARGETS, TIMESTEPS

BATCH = 9
STEPS, TIMES = 10, 9
BETA, KL_WEIGHT, CLIP = 1.0, 1e-4, 5.0


class PublishedLoop:
    """A model with two adapters on one device; `sample` and `train` are what an epoch repeats."""

    def __init__(self, folder: str, pixels: int, device: torch.device) -> None:
        self.device = device
        transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=torch.float32)
        lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian", target_modules=list(LORA_TARGETS))
        self.transformer = get_peft_model(transformer.to(device), lora)
        self.transformer.add_adapter("old", lora)
        self.vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", dtype=torch.float32).to(device)
        self.vae.requires_grad_(False)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        scheduler.set_timesteps(STEPS)
        self.sigmas = scheduler.sigmas.clone()
        self.shape = (16, pixels // 8, pixels // 8)
        self.transformer.set_adapter("default")
        self.policy = [value for value in self.transformer.parameters() if value.requires_grad]
        assert len(self.policy) > 0
        self.optimizer = torch.optim.AdamW(self.policy, lr=3e-4, weight_decay=1e-4, fused=False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=device.type == "cuda")

    def velocity(self, x: torch.Tensor, t: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """v f32 (B, ...) of the adapter that is set; autocast is CUDA's: a CPU has no fast float16."""
        with torch.autocast(self.device.type, dtype=torch.float16, enabled=self.device.type == "cuda"):
            (v,) = self.transformer(
                hidden_states=x,
                timestep=t * TIMESTEPS,
                encoder_hidden_states=conditioning["prompt_embeds"],
                pooled_projections=conditioning["pooled_prompt_embeds"],
                return_dict=False,
            )
        return v.float()

    @torch.no_grad()
    def sample(self, conditioning: dict[str, torch.Tensor]) -> tuple[torch.Tensor, np.ndarray]:
        """9 clean latents with the old policy, and their images."""
        self.transformer.set_adapter("old")
        noise = torch.randn(BATCH, *self.shape, device=self.device)
        x0 = solve("dpm2", lambda x, s: self.velocity(x, x.new_full((BATCH,), s), conditioning), noise, self.sigmas)
        pixels = self.vae.decode(x0 / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
        return x0, ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()

    def train(self, x0: torch.Tensor, optimality: torch.Tensor, conditioning: dict[str, torch.Tensor]) -> None:
        """Every training time of 9 samples: their gradient is added to what is there."""
        for sigma in self.sigmas[:TIMES].tolist():
            t = torch.full((BATCH,), sigma, device=self.device)
            x_t = interpolate(x0, torch.randn_like(x0), t)
            with torch.no_grad():
                self.transformer.set_adapter("old")
                v_old = self.velocity(x_t, t, conditioning)
                with self.transformer.disable_adapter():
                    v_ref = self.velocity(x_t, t, conditioning)
            self.transformer.set_adapter("default")
            v = self.velocity(x_t, t, conditioning)
            settings = {"beta": BETA, "scale": CLIP, "v_ref": v_ref, "kl_weight": KL_WEIGHT}
            self.scaler.scale(nft_loss(v, v_old, x0, x_t, t, optimality, **settings).total).backward()

    def step(self) -> None:
        """One optimizer step."""
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.policy, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
