"""Minari: a dataset of episodes with their infos, recorded, loaded again and replayed."""

import minari
import numpy as np
from mixture import make


def main(episodes=20, dataset_id="flowgym/mixture-v0"):
    if dataset_id in minari.list_local_datasets():
        minari.delete_dataset(dataset_id)
    env = minari.DataCollector(make(info_keys="numeric"), record_infos=True)
    for episode in range(episodes):
        env.reset(seed=episode)
        ended = False
        while not ended:
            *_, ended, _, _ = env.step(env.action_space.sample())
    dataset = env.create_dataset(dataset_id, requirements=["flowgym_gym"])
    again = dataset.recover_environment()
    for episode, recorded in enumerate(dataset.iterate_episodes()):
        again.reset(seed=episode)
        paid = [again.step(action)[1] for action in recorded.actions]
        np.testing.assert_array_equal(paid, recorded.rewards)
    print(f"Minari: {dataset.total_steps} steps of {dataset.total_episodes} episodes, replayed")
    return dataset


if __name__ == "__main__":
    main()
