"""Estimate the effects of patches from gradients, and compare the estimates with exact replays."""
