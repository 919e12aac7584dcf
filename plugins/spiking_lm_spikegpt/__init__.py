"""SpikeGPT (Zhu et al., arXiv 2302.13939) on snnTorch."""
