"""Run folders: preparing, training, resuming, evaluating and showing a run."""
