// CleanRL's wrappers over K environments, as environments.py has them in numpy and with its bits: float64, every
// operation in numpy's order, compiled without contraction into fused multiply-adds.

#include <cmath>
#include <cstdint>

namespace {

// Each points to K values, or K rows of `size`; the fields of environments.py's structure, in its order.
struct Wrappers {
  int64_t count, size, max_episode_steps;
  double gamma, epsilon, limit;
  const double *raw_observations, *raw_rewards;
  const bool *terminated;
  double *observation_mean, *observation_variance, *observation_count;
  double *reward_mean, *reward_variance, *reward_count;
  double *discounted_rewards, *episode_returns;
  int64_t *episode_steps;
  float *observations, *rewards;
  bool *ends;
};

void take(const double *values, int64_t size, double *mean, double *variance, double *count) {
  const double total = *count + 1.0;
  for (int64_t i = 0; i < size; ++i) {
    const double delta = values[i] - mean[i];
    mean[i] += delta / total;
    variance[i] = (variance[i] * *count + delta * delta * *count / total) / total;
  }
  *count = total;
}

template <typename Real>
Real limited(Real value, Real limit) {  // a NaN stays one
  value = value < -limit ? -limit : value;
  return value > limit ? limit : value;
}

void take_observation(Wrappers &w, int64_t k) {
  const int64_t row = k * w.size;
  take(w.raw_observations + row, w.size, w.observation_mean + row, w.observation_variance + row,
       w.observation_count + k);
}

}  // namespace

extern "C" {

// What a step of the simulations means for statistics, rewards and episodes; how many episodes ended.
int64_t account(Wrappers &w) {
  int64_t ended = 0;
  for (int64_t k = 0; k < w.count; ++k) {
    const double reward = w.raw_rewards[k];
    w.episode_returns[k] += reward;
    w.episode_steps[k] += 1;
    take_observation(w, k);
    w.discounted_rewards[k] = w.discounted_rewards[k] * w.gamma * (w.terminated[k] ? 0.0 : 1.0) + reward;
    take(w.discounted_rewards + k, 1, w.reward_mean + k, w.reward_variance + k, w.reward_count + k);
    w.rewards[k] = float(limited(reward / std::sqrt(w.reward_variance[k] + w.epsilon), w.limit));
    w.ends[k] = w.terminated[k] || w.episode_steps[k] >= w.max_episode_steps;
    ended += w.ends[k];
  }
  return ended;
}

// Environment k's simulation has begun an episode.
void begin_episode(Wrappers &w, int64_t k) {
  take_observation(w, k);
  w.episode_steps[k] = 0;
  w.episode_returns[k] = 0.0;
}

void normalise_observations(Wrappers &w) {
  for (int64_t k = 0; k < w.count; ++k)
    for (int64_t i = k * w.size; i < (k + 1) * w.size; ++i) {
      const double scale = std::sqrt(w.observation_variance[i] + w.epsilon);
      w.observations[i] = limited(float((w.raw_observations[i] - w.observation_mean[i]) / scale), float(w.limit));
    }
}

}  // extern "C"
