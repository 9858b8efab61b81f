"""`shapes`: a latent diffusion model in Stable Diffusion's layout that paints coloured shapes."""
