"""What stable-baselines3 needs: an adapter, networks, policies, and policies without it."""
