"""`shapes`: a latent diffusion model in the Stable Diffusion layout that paints coloured shapes from captions."""
