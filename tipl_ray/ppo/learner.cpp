// PPO's networks of many trials, one trial after another, so that what a trial touches stays in cache.
//
// Compiled by compiled_learner.py for the shapes of one experiment: OBSERVATION, ACTION, POLICY_1, POLICY_2, CRITIC_1,
// CRITIC_2 (widths), BATCH (samples per minibatch, a multiple of 16) and REAL (float; double in tests) are macros, and so
// are RELU (else tanh), CLIP_VALUES, DPO (else PPO's clipping) and DISCRETE, each 0 or 1. With DISCRETE the actor's outputs
// are logits of ACTION choices, an action is 1 in its choice and 0 elsewhere, and there is no log_std. With BFLOAT16 the
// factors of the minibatches' matrix products are rounded to bfloat16, two of which the processor multiplies and adds to
// a float at once; sums, activations, weights and Adam stay float.
//
// Activations are feature-major: a layer's output is (features, BATCH), with the samples of the minibatch along the
// vector lanes. Weights are (inputs, outputs). Every sum runs in an order that the source fixes, lane by lane of 16,
// whatever the width of the machine's vectors, and exp and tanh are our own: the same source and compiler give the
// same bits on any processor with fused multiply-add.

#include <cmath>
#include <cstdint>
#include <cstring>
#if BFLOAT16
#include <immintrin.h>
#endif

namespace {

constexpr int LANES = 16;
constexpr int O = OBSERVATION, A = ACTION, B = BATCH;
constexpr int NV = B / LANES;
static_assert(B % LANES == 0, "BATCH must be a multiple of 16");

typedef REAL Vector __attribute__((vector_size(LANES * sizeof(REAL))));
typedef REAL Unaligned __attribute__((vector_size(LANES * sizeof(REAL)), aligned(sizeof(REAL)), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * sizeof(int32_t))));

#define UNROLL _Pragma("GCC unroll 32")
#define INLINE __attribute__((always_inline)) inline

constexpr int padded(int size) { return (size + LANES - 1) / LANES * LANES; }

INLINE REAL lane_sum(Vector values) {
  REAL total = 0;
  UNROLL for (int lane = 0; lane < LANES; ++lane) total += values[lane];
  return total;
}

// exp and tanh ------------------------------------------------------------------------------------------------------

// exp(x) - 1 and 2^n of the range reduction x = n ln 2 + r, |r| <= ln 2 / 2; the polynomial's error is below one ulp.
INLINE Vector exp_minus_one(Vector x, Vector &power) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vector shifted = x * 1.44269504088896341f + magic;
  Vector n = shifted - magic;
  Vector r = x - n * 0.693145751953125f;
  r = r - n * 1.42860682030941723e-6f;
  Vector p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * (r * r) + r;
  Integers bits = (__builtin_convertvector(n, Integers) + 127) << 23;
  __builtin_memcpy(&power, &bits, sizeof bits);
  return power * p + (power - 1.0f);
}

template <typename Real>
struct Elementary;

template <>
struct Elementary<float> {
  static INLINE Vector exp(Vector x) {
    Vector power;
    x = x < -87.0f ? Vector{} - 87.0f : x;
    x = x > 88.0f ? Vector{} + 88.0f : x;
    return exp_minus_one(x, power) + 1.0f;
  }
  static INLINE Vector tanh(Vector x) {
    Vector size = x < 0.0f ? -x : x;
    Vector power, doubled = size * -2.0f;
    doubled = doubled < -20.0f ? Vector{} - 20.0f : doubled;
    Vector e = exp_minus_one(doubled, power);
    Vector t = -e / (e + 2.0f);
    return x < 0.0f ? -t : t;
  }
};

template <>
struct Elementary<double> {
  template <typename V>
  static V exp(V x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::exp(x[lane]);
    return x;
  }
  template <typename V>
  static V tanh(V x) {
    for (int lane = 0; lane < LANES; ++lane) x[lane] = std::tanh(x[lane]);
    return x;
  }
};

INLINE Vector vector_exp(Vector x) { return Elementary<REAL>::exp(x); }
INLINE Vector vector_tanh(Vector x) { return Elementary<REAL>::tanh(x); }

// Matrix products ---------------------------------------------------------------------------------------------------

// Rows of outputs kept in registers at once: 24 accumulators of the 32 vector registers.
constexpr int ROWS = NV >= 24 ? 1 : (24 / NV > 8 ? 8 : 24 / NV);

// y_r = start_r + sum_k scalars[k * k_stride + r * r_stride] x_k for R rows of y.
template <int R, int INNER, int K_STRIDE, int R_STRIDE>
INLINE void product_rows(const REAL *__restrict scalars, const REAL *start, const Vector *__restrict x,
                         Vector *__restrict y) {
  Vector sums[R][NV];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = Vector{} + (start ? start[r] : REAL(0));
  for (int k = 0; k < INNER; ++k) {
    UNROLL for (int r = 0; r < R; ++r) {
      const REAL scalar = scalars[k * K_STRIDE + r * R_STRIDE];
      UNROLL for (int v = 0; v < NV; ++v) sums[r][v] += scalar * x[k * NV + v];
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < NV; ++v) y[r * NV + v] = sums[r][v];
}

template <int OUTER, int INNER, int K_STRIDE, int R_STRIDE>
void product(const REAL *scalars, const REAL *start, const Vector *x, Vector *y) {
  int r = 0;
  for (; r + ROWS <= OUTER; r += ROWS)
    product_rows<ROWS, INNER, K_STRIDE, R_STRIDE>(scalars + r * R_STRIDE, start ? start + r : nullptr, x, y + r * NV);
  constexpr int REST = OUTER % ROWS;
  if constexpr (REST > 0)
    product_rows<REST, INNER, K_STRIDE, R_STRIDE>(scalars + r * R_STRIDE, start ? start + r : nullptr, x, y + r * NV);
}

// dW[i, o] = sum_b x[i, b] dy[o, b], with dy given sample-major and padded: (B, padded(OUT)).
template <int R, int C, int OUT>
INLINE void weight_gradient_block(const REAL *__restrict x, const REAL *__restrict dy, REAL *__restrict gradient) {
  Vector sums[R][C] = {};
  for (int b = 0; b < B; ++b) {
    const Vector *row = reinterpret_cast<const Vector *>(dy + b * padded(OUT));
    UNROLL for (int r = 0; r < R; ++r) {
      const REAL scalar = x[r * B + b];
      UNROLL for (int c = 0; c < C; ++c) sums[r][c] += scalar * row[c];
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    if constexpr (OUT % LANES == 0) {
      UNROLL for (int c = 0; c < C; ++c) *reinterpret_cast<Unaligned *>(gradient + r * OUT + c * LANES) = sums[r][c];
    } else {
      static_assert(OUT % LANES == 0 || C == 1, "a padded width has one column of vectors at a time");
      for (int o = 0; o < (OUT < LANES ? OUT : LANES); ++o) gradient[r * OUT + o] = sums[r][0][o];
    }
  }
}

template <int R, int IN, int OUT>
INLINE void weight_gradient_rows(const REAL *x, const REAL *dy, REAL *gradient) {
  if constexpr (OUT % (4 * LANES) == 0) {
    for (int o = 0; o < OUT; o += 4 * LANES) weight_gradient_block<R, 4, OUT>(x, dy + o, gradient + o);
  } else if constexpr (OUT % LANES == 0) {
    for (int o = 0; o < OUT; o += LANES) weight_gradient_block<R, 1, OUT>(x, dy + o, gradient + o);
  } else {
    constexpr int WHOLE = OUT / LANES * LANES;
    for (int r = 0; r < R; ++r)
      for (int o = 0; o < WHOLE; ++o) {
        REAL total = 0;
        for (int b = 0; b < B; ++b) total += x[r * B + b] * dy[b * padded(OUT) + o];
        gradient[r * OUT + o] = total;
      }
    Vector sums[R] = {};
    for (int b = 0; b < B; ++b) {
      const Vector row = *reinterpret_cast<const Vector *>(dy + b * padded(OUT) + WHOLE);
      UNROLL for (int r = 0; r < R; ++r) sums[r] += x[r * B + b] * row;
    }
    for (int r = 0; r < R; ++r)
      for (int o = WHOLE; o < OUT; ++o) gradient[r * OUT + o] = sums[r][o - WHOLE];
  }
}

#if BFLOAT16
// The same in bfloat16: 32 bits of `low` and, above it, `high`, each rounded to the nearest, ties to even.
INLINE Integers pair(Vector low, Vector high) {
  const __m512bh both = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi32(0x1f000f, 0x1e000e, 0x1d000d, 0x1c000c, 0x1b000b, 0x1a000a, 0x190009, 0x180008,
                                         0x170007, 0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
  return (Integers)_mm512_permutexvar_epi16(order, (__m512i)both);
}

// The first floats of a row, as many as there are; 0 for the others.
INLINE Vector some(const REAL *row, int lanes) {
  const __mmask16 mask = lanes >= LANES ? 0xffff : lanes > 0 ? (1 << lanes) - 1 : 0;
  return (Vector)_mm512_maskz_loadu_ps(mask, row);
}

// sum + low x low + high x high, lane by lane.
INLINE Vector dot(Vector sum, Integers x, Integers y) {
  return (Vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}

INLINE Integers everywhere(int32_t pair) { return Integers{} + pair; }

constexpr int halved(int size) { return (size + 1) / 2; }

// Neighbouring rows of x as pairs; a last one alone has 0 beside it.
template <int ROWS_OF_X, int COLUMNS>
INLINE void pair_rows(const Vector *x, Integers *pairs) {
  for (int k = 0; k < ROWS_OF_X; k += 2)
    for (int v = 0; v < COLUMNS; ++v)
      pairs[k / 2 * COLUMNS + v] = pair(x[k * COLUMNS + v], k + 1 < ROWS_OF_X ? x[(k + 1) * COLUMNS + v] : Vector{});
}

// Neighbours within a row as pairs: `length` floats become halved(length) pairs, padded to whole vectors of them.
template <int LENGTH>
INLINE void pair_within(const REAL *row, int32_t *pairs) {
  for (int j = 0; j < LENGTH; j += 2 * LANES) {
    const Vector low = some(row + j, LENGTH - j), high = some(row + j + LANES, LENGTH - j - LANES);
    const __m512bh narrow = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(pairs + j / 2, &narrow, sizeof(narrow));
  }
}

template <int R, int PAIRS, int K_STRIDE, int R_STRIDE>
INLINE void pair_product_rows(const int32_t *__restrict scalars, const REAL *start, const Integers *__restrict x,
                              Vector *__restrict y) {
  Vector sums[R][NV];
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = Vector{} + (start ? start[r] : REAL(0));
  for (int k = 0; k < PAIRS; ++k) {
    UNROLL for (int r = 0; r < R; ++r) {
      const Integers scalar = everywhere(scalars[k * K_STRIDE + r * R_STRIDE]);
      UNROLL for (int v = 0; v < NV; ++v) sums[r][v] = dot(sums[r][v], scalar, x[k * NV + v]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int v = 0; v < NV; ++v) y[r * NV + v] = sums[r][v];
}

template <int OUTER, int PAIRS, int K_STRIDE, int R_STRIDE>
void pair_product(const int32_t *scalars, const REAL *start, const Integers *x, Vector *y) {
  int r = 0;
  for (; r + ROWS <= OUTER; r += ROWS)
    pair_product_rows<ROWS, PAIRS, K_STRIDE, R_STRIDE>(scalars + r * R_STRIDE, start ? start + r : nullptr, x,
                                                       y + r * NV);
  constexpr int REST = OUTER % ROWS;
  if constexpr (REST > 0)
    pair_product_rows<REST, PAIRS, K_STRIDE, R_STRIDE>(scalars + r * R_STRIDE, start ? start + r : nullptr, x,
                                                       y + r * NV);
}

// R rows of dW over C vectors of outputs: x as pairs of neighbouring samples, dy as pairs of neighbouring samples' rows.
template <int R, int C, int OUT, int WIDTH>
INLINE void pair_weight_gradient(const int32_t *__restrict x, const Integers *__restrict dy, REAL *__restrict gradient) {
  Vector sums[R][C] = {};
  for (int b = 0; b < B / 2; ++b) {
    UNROLL for (int r = 0; r < R; ++r) {
      const Integers scalar = everywhere(x[r * (B / 2) + b]);
      UNROLL for (int c = 0; c < C; ++c) sums[r][c] = dot(sums[r][c], scalar, dy[b * (padded(OUT) / LANES) + c]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int c = 0; c < C; ++c) {
      if constexpr (WIDTH == LANES) {
        *reinterpret_cast<Unaligned *>(gradient + r * OUT + c * LANES) = sums[r][c];
      } else {
        for (int o = 0; o < WIDTH; ++o) gradient[r * OUT + o] = sums[r][c][o];
      }
    }
}

template <int R, int OUT>
INLINE void pair_weight_gradient_rows(const int32_t *x, const Integers *dy, REAL *gradient) {
  constexpr int WHOLE = OUT / LANES, FOURS = WHOLE / 4 * 4, REST = OUT % LANES;
  for (int c = 0; c < FOURS; c += 4) pair_weight_gradient<R, 4, OUT, LANES>(x, dy + c, gradient + c * LANES);
  for (int c = FOURS; c < WHOLE; ++c) pair_weight_gradient<R, 1, OUT, LANES>(x, dy + c, gradient + c * LANES);
  if constexpr (REST > 0) pair_weight_gradient<R, 1, OUT, REST>(x, dy + WHOLE, gradient + WHOLE * LANES);
}
#endif

// Layers ------------------------------------------------------------------------------------------------------------

template <int IN, int OUT>
struct Layer {
  static constexpr int SIZE = IN * OUT + OUT;

#if BFLOAT16
  static void forward(const REAL *weights, const Vector *x, Vector *y) {
    alignas(64) int32_t scalars[halved(IN) * padded(OUT)];
    Integers pairs[halved(IN) * NV];
    for (int i = 0; i < IN; i += 2)
      for (int o = 0; o < OUT; o += LANES) {
        const int lanes = OUT - o < LANES ? OUT - o : LANES;
        const Vector low = some(weights + i * OUT + o, lanes), high = i + 1 < IN ? some(weights + (i + 1) * OUT + o, lanes) : Vector{};
        *reinterpret_cast<Integers *>(scalars + i / 2 * padded(OUT) + o) = pair(low, high);
      }
    pair_rows<IN, NV>(x, pairs);
    pair_product<OUT, halved(IN), padded(OUT), 1>(scalars, weights + IN * OUT, pairs, y);
  }

  static void input_gradient(const REAL *weights, const Vector *dy, Vector *dx) {
    constexpr int PAIRS = halved(OUT), STRIDE = padded(PAIRS);
    alignas(64) int32_t scalars[IN * STRIDE];
    Integers pairs[PAIRS * NV];
    for (int i = 0; i < IN; ++i) pair_within<OUT>(weights + i * OUT, scalars + i * STRIDE);
    pair_rows<OUT, NV>(dy, pairs);
    pair_product<IN, PAIRS, 1, STRIDE>(scalars, nullptr, pairs, dx);
  }

  static void weight_gradient(const Vector *x, const Vector *dy, REAL *gradient) {
    // Pairs of neighbouring samples: of x as scalars, of dy with the outputs along the lanes.
    alignas(64) int32_t scalars[IN * (B / 2) + LANES], rows[OUT * (B / 2) + LANES];
    alignas(64) int32_t columns[B / 2 * padded(OUT)];
    pair_within<IN * B>(reinterpret_cast<const REAL *>(x), scalars);
    pair_within<OUT * B>(reinterpret_cast<const REAL *>(dy), rows);
    for (int b0 = 0; b0 < B / 2; b0 += LANES / 2)
      for (int o = 0; o < padded(OUT); ++o)
        for (int b = b0; b < b0 + LANES / 2; ++b) columns[b * padded(OUT) + o] = o < OUT ? rows[o * (B / 2) + b] : 0;
    const Integers *pairs = reinterpret_cast<const Integers *>(columns);
    int i = 0;
    for (; i + 6 <= IN; i += 6) pair_weight_gradient_rows<6, OUT>(scalars + i * (B / 2), pairs, gradient + i * OUT);
    if constexpr (IN % 6 > 0)
      pair_weight_gradient_rows<IN % 6, OUT>(scalars + i * (B / 2), pairs, gradient + i * OUT);
    bias_gradient(dy, gradient);
  }
#else
  static void forward(const REAL *weights, const Vector *x, Vector *y) {
    product<OUT, IN, OUT, 1>(weights, weights + IN * OUT, x, y);
  }

  static void input_gradient(const REAL *weights, const Vector *dy, Vector *dx) {
    product<IN, OUT, 1, OUT>(weights, nullptr, dy, dx);
  }

  static void weight_gradient(const Vector *x, const Vector *dy, REAL *gradient) {
    alignas(64) REAL samples[B * padded(OUT)];
    const REAL *dy_scalars = reinterpret_cast<const REAL *>(dy);
    for (int b0 = 0; b0 < B; b0 += LANES)
      for (int o = 0; o < padded(OUT); ++o)
        for (int b = b0; b < b0 + LANES; ++b) samples[b * padded(OUT) + o] = o < OUT ? dy_scalars[o * B + b] : REAL(0);
    const REAL *x_scalars = reinterpret_cast<const REAL *>(x);
    int i = 0;
    for (; i + 6 <= IN; i += 6) weight_gradient_rows<6, IN, OUT>(x_scalars + i * B, samples, gradient + i * OUT);
    if constexpr (IN % 6 > 0) weight_gradient_rows<IN % 6, IN, OUT>(x_scalars + i * B, samples, gradient + i * OUT);
    bias_gradient(dy, gradient);
  }
#endif

  static INLINE void bias_gradient(const Vector *dy, REAL *gradient) {
    for (int o = 0; o < OUT; ++o) {
      Vector total = dy[o * NV];
      UNROLL for (int v = 1; v < NV; ++v) total += dy[o * NV + v];
      gradient[IN * OUT + o] = lane_sum(total);
    }
  }

  // One sample, the outputs along the lanes: the rollout's form, bound by reading the weights once.
  static INLINE void single(const REAL *weights, const REAL *x, REAL *y) {
    const REAL *biases = weights + IN * OUT;
    constexpr int WHOLE = OUT / LANES;
    constexpr int BLOCK = WHOLE > 16 ? 16 : (WHOLE > 0 ? WHOLE : 1);
    int o = 0;
    if constexpr (WHOLE > 0) {
      for (; o + BLOCK * LANES <= OUT; o += BLOCK * LANES) single_block<BLOCK>(weights, biases, x, y, o);
      for (; o + LANES <= OUT; o += LANES) single_block<1>(weights, biases, x, y, o);
    }
    if constexpr (OUT % LANES > 0) {
      constexpr int REST = OUT % LANES;
      REAL sums[REST];
      for (int r = 0; r < REST; ++r) sums[r] = biases[o + r];
      for (int i = 0; i < IN; ++i)
        for (int r = 0; r < REST; ++r) sums[r] += x[i] * weights[i * OUT + o + r];
      for (int r = 0; r < REST; ++r) y[o + r] = sums[r];
    }
  }

  template <int C>
  static INLINE void single_block(const REAL *weights, const REAL *biases, const REAL *x, REAL *y, int o) {
    Vector sums[C];
    UNROLL for (int c = 0; c < C; ++c) sums[c] = *reinterpret_cast<const Unaligned *>(biases + o + c * LANES);
    for (int i = 0; i < IN; ++i) {
      UNROLL for (int c = 0; c < C; ++c)
        sums[c] += x[i] * *reinterpret_cast<const Unaligned *>(weights + i * OUT + o + c * LANES);
    }
    UNROLL for (int c = 0; c < C; ++c) *reinterpret_cast<Unaligned *>(y + o + c * LANES) = sums[c];
  }
};

INLINE Vector activation(Vector x) { return RELU ? (x > 0 ? x : Vector{}) : vector_tanh(x); }

// Gradient of an activation's input, from that of its output and the output itself.
INLINE Vector activation_gradient(Vector d, Vector y) { return RELU ? (y > 0 ? d : Vector{}) : d * (REAL(1) - y * y); }

template <int SIZE>
INLINE void activate(Vector *y) {
  for (int j = 0; j < SIZE * NV; ++j) y[j] = activation(y[j]);
}

template <int H1, int H2, int OUT>
struct Network {
  using First = Layer<O, H1>;
  using Second = Layer<H1, H2>;
  using Head = Layer<H2, OUT>;
  static constexpr int SECOND = First::SIZE, HEAD = SECOND + Second::SIZE, SIZE = HEAD + Head::SIZE;

  Vector hidden_1[H1 * NV], hidden_2[H2 * NV], output[OUT * NV];

  void forward(const REAL *weights, const Vector *x) {
    First::forward(weights, x, hidden_1);
    activate<H1>(hidden_1);
    Second::forward(weights + SECOND, hidden_1, hidden_2);
    activate<H2>(hidden_2);
    Head::forward(weights + HEAD, hidden_2, output);
  }

  // Gradient of every weight, from the gradient of the output; `forward` must have run on the same x.
  void backward(const REAL *weights, const Vector *x, const Vector *d_output, REAL *gradient) {
    Vector d_2[H2 * NV], d_1[H1 * NV];
    Head::weight_gradient(hidden_2, d_output, gradient + HEAD);
    Head::input_gradient(weights + HEAD, d_output, d_2);
    for (int j = 0; j < H2 * NV; ++j) d_2[j] = activation_gradient(d_2[j], hidden_2[j]);
    Second::weight_gradient(hidden_1, d_2, gradient + SECOND);
    Second::input_gradient(weights + SECOND, d_2, d_1);
    for (int j = 0; j < H1 * NV; ++j) d_1[j] = activation_gradient(d_1[j], hidden_1[j]);
    First::weight_gradient(x, d_1, gradient);
  }

  static void single(const REAL *weights, const REAL *x, REAL *y) {
    alignas(64) REAL h1[padded(H1)] = {}, h2[padded(H2)] = {};
    First::single(weights, x, h1);
    for (int j = 0; j < padded(H1); j += LANES) *reinterpret_cast<Vector *>(h1 + j) = activation(*reinterpret_cast<Vector *>(h1 + j));
    Second::single(weights + SECOND, h1, h2);
    for (int j = 0; j < padded(H2); j += LANES) *reinterpret_cast<Vector *>(h2 + j) = activation(*reinterpret_cast<Vector *>(h2 + j));
    Head::single(weights + HEAD, h2, y);
  }
};

using Actor = Network<POLICY_1, POLICY_2, A>;
using Critic = Network<CRITIC_1, CRITIC_2, 1>;
constexpr int LOG_STD = Actor::SIZE, CRITIC = LOG_STD + (DISCRETE ? 0 : A), SIZE = CRITIC + Critic::SIZE;

struct Workspace {
  Vector x[O * NV], actions[A * NV];
  Actor actor;
  Critic critic;
};

INLINE REAL scalar_exp(REAL x) { return vector_exp(Vector{} + x)[0]; }

// Samples `indices` of a trial's rollout, feature-major.
template <int FEATURES>
INLINE void gather(const float *rows, const int32_t *indices, Vector *out) {
  REAL *scalars = reinterpret_cast<REAL *>(out);
  for (int b = 0; b < B; ++b)
    for (int f = 0; f < FEATURES; ++f) scalars[f * B + b] = rows[int64_t(indices[b]) * FEATURES + f];
}

INLINE Vector gather_scalar(const float *values, const int32_t *indices) {
  Vector out;
  for (int lane = 0; lane < LANES; ++lane) out[lane] = values[indices[lane]];
  return out;
}

// log softmax of the logits of one vector of samples.
INLINE void log_softmax(const Vector *logits, int v, Vector *out) {
  Vector most = logits[v], total = {};
  for (int a = 1; a < A; ++a) most = logits[a * NV + v] > most ? logits[a * NV + v] : most;
  for (int a = 0; a < A; ++a) total += vector_exp(logits[a * NV + v] - most);
  for (int lane = 0; lane < LANES; ++lane) total[lane] = REAL(std::log(double(total[lane])));
  for (int a = 0; a < A; ++a) out[a] = logits[a * NV + v] - most - total;
}

// log N(action; mean, exp(log_std)) of each sample, or log softmax(mean) of its choice.
INLINE void log_probabilities(const REAL *log_std, const Vector *mean, const Vector *actions, Vector *out) {
  UNROLL for (int v = 0; v < NV; ++v) out[v] = Vector{};
  if constexpr (DISCRETE) {
    for (int v = 0; v < NV; ++v) {
      Vector log_p[A];
      log_softmax(mean, v, log_p);
      for (int a = 0; a < A; ++a) out[v] += actions[a * NV + v] * log_p[a];
    }
    return;
  }
  for (int a = 0; a < A; ++a) {
    const REAL half_precision = REAL(0.5) * scalar_exp(REAL(-2) * log_std[a]);
    const REAL constant = log_std[a] + REAL(0.91893853320467274178);  // log sqrt(2 pi)
    UNROLL for (int v = 0; v < NV; ++v) {
      const Vector error = actions[a * NV + v] - mean[a * NV + v];
      out[v] -= error * error * half_precision + constant;
    }
  }
}

}  // namespace

extern "C" {

struct Rollouts {  // of K trials, S steps each; row-major
  const float *observations;  // (K, S + 1, O): the last is the one after the last step
  const float *actions;       // (K, S, A)
  const float *rewards;       // (K, S)
  const float *ends;          // (K, S + 1): 1 where the observation of that step begins an episode
  float *log_probabilities;   // (K, S)
  float *values;              // (K, S)
  float *advantages;          // (K, S)
  float *returns;             // (K, S)
};

struct Hyperparameters {
  REAL clip_coefficient, entropy_coefficient, value_coefficient, max_gradient_norm, adam_epsilon, gamma, gae_lambda;
  REAL policy_rate_ratio;
  REAL desired_kl, target_kl;  // 0: neither adapts the learning rate nor ends the epochs
};

// rl_games' adaptive scheduler (rl_games/common/schedulers.py, AdaptiveScheduler).
constexpr double FASTER = 1.5, LEAST_RATE = 1e-6, MOST_RATE = 1e-2;

int64_t num_parameters() { return SIZE; }
int64_t num_policy_weights() { return CRITIC; }

// Actions of `rows` samples: mean + exp(log_std) noise, row j by the policy of parameters[owners[j]]; no noise: the mean.
// Of discrete ones the largest logit + noise, which of Gumbel's noise is a sample of their softmax.
void act(int64_t rows, const REAL *parameters, int64_t stride, const int32_t *owners, const float *observations,
         const float *noise, float *actions) {
  for (int64_t j = 0; j < rows; ++j) {
    const REAL *weights = parameters + (owners ? owners[j] : j) * stride;
    alignas(64) REAL x[O], mean[padded(A)];
    for (int f = 0; f < O; ++f) x[f] = observations[j * O + f];
    Actor::single(weights, x, mean);
    if constexpr (DISCRETE) {
      int best = 0;
      for (int a = 0; a < A; ++a) {
        if (noise) mean[a] += noise[j * A + a];
        if (mean[a] > mean[best]) best = a;
      }
      for (int a = 0; a < A; ++a) actions[j * A + a] = a == best;
    } else {
      for (int a = 0; a < A; ++a)
        actions[j * A + a] = noise ? mean[a] + scalar_exp(weights[LOG_STD + a]) * noise[j * A + a] : mean[a];
    }
  }
}

// Log-probabilities and values of the rollouts, then generalised advantages and returns.
void advantages(int64_t trials, int64_t steps, const REAL *parameters, Rollouts rollouts, Hyperparameters hyper) {
  static thread_local Workspace work;
  for (int64_t k = 0; k < trials; ++k) {
    const REAL *weights = parameters + k * SIZE;
    const float *observations = rollouts.observations + k * (steps + 1) * O;
    float *values = rollouts.values + k * steps;
    REAL next_value = 0;
    for (int64_t s = 0; s < steps + 1; s += B) {
      int32_t indices[B], action_indices[B];
      for (int b = 0; b < B; ++b) {
        indices[b] = s + b < steps + 1 ? s + b : steps;
        action_indices[b] = s + b < steps ? s + b : steps - 1;
      }
      gather<O>(observations, indices, work.x);
      gather<A>(rollouts.actions + k * steps * A, action_indices, work.actions);
      work.critic.forward(weights + CRITIC, work.x);
      work.actor.forward(weights, work.x);
      Vector log_probability[NV];
      log_probabilities(weights + LOG_STD, work.actor.output, work.actions, log_probability);
      for (int b = 0; b < B && s + b < steps + 1; ++b) {
        const REAL value = work.critic.output[b / LANES][b % LANES];
        if (s + b == steps) {
          next_value = value;
        } else {
          values[s + b] = value;
          rollouts.log_probabilities[k * steps + s + b] = log_probability[b / LANES][b % LANES];
        }
      }
    }
    const float *ends = rollouts.ends + k * (steps + 1);
    REAL advantage = 0;
    for (int64_t s = steps - 1; s >= 0; --s) {
      const REAL going_on = REAL(1) - ends[s + 1];
      const REAL after = s == steps - 1 ? next_value : REAL(values[s + 1]);
      const REAL delta = rollouts.rewards[k * steps + s] + hyper.gamma * after * going_on - values[s];
      advantage = delta + hyper.gamma * hyper.gae_lambda * going_on * advantage;
      rollouts.advantages[k * steps + s] = advantage;
      rollouts.returns[k * steps + s] = advantage + values[s];
    }
  }
}

// Gradient of PPO's loss on one minibatch of trial k's rollout, (SIZE,); if asked for, the policy's approximate KL
// divergence from the one that collected, mean of (ratio - 1) - log ratio (http://joschu.net/blog/kl-approx.html).
void gradient(int64_t k, int64_t steps, const REAL *weights, Rollouts rollouts, const int32_t *indices,
              Hyperparameters hyper, REAL *out, REAL *divergence) {
  static thread_local Workspace work;
  gather<O>(rollouts.observations + k * (steps + 1) * O, indices, work.x);
  gather<A>(rollouts.actions + k * steps * A, indices, work.actions);

  work.actor.forward(weights, work.x);
  Vector log_probability[NV], advantage[NV], total = {}, squares = {};
  log_probabilities(weights + LOG_STD, work.actor.output, work.actions, log_probability);
  UNROLL for (int v = 0; v < NV; ++v) {
    advantage[v] = gather_scalar(rollouts.advantages + k * steps, indices + v * LANES);
    total += advantage[v];
  }
  const REAL mean = lane_sum(total) / B;
  UNROLL for (int v = 0; v < NV; ++v) {
    advantage[v] -= mean;
    squares += advantage[v] * advantage[v];
  }
  const REAL deviation = std::sqrt(lane_sum(squares) / (B - 1)) + REAL(1e-8);
  Vector d_log_probability[NV], divergences = {};
  UNROLL for (int v = 0; v < NV; ++v) {
    const Vector normalised = advantage[v] / deviation;
    const Vector log_ratio =
        log_probability[v] - gather_scalar(rollouts.log_probabilities + k * steps, indices + v * LANES);
    const Vector ratio = vector_exp(log_ratio);
    if (divergence) divergences += (ratio - REAL(1)) - log_ratio;
    const Vector chosen = -normalised * ratio;
    if constexpr (DPO) {
      // The drift is x - 2 tanh(x / 2) of x = (ratio - 1) A where A is positive, x - 0.6 tanh(x / 0.6) of x = A log ratio
      // where it is negative, and 0 where that is negative; its slope in x is a squared tanh.
      const auto positive = normalised >= 0;
      const Vector x = positive ? (ratio - REAL(1)) * normalised : log_ratio * normalised;
      const Vector t = vector_tanh(positive ? x * REAL(1 / 2.0) : x * REAL(1 / 0.6));
      const Vector slope = x > 0 ? t * t : Vector{};
      d_log_probability[v] = (chosen + slope * (positive ? normalised * ratio : normalised)) / REAL(B);
    } else {
      const Vector low = Vector{} + (REAL(1) - hyper.clip_coefficient);
      const Vector high = Vector{} + (REAL(1) + hyper.clip_coefficient);
      const Vector clipped = ratio < low ? low : (ratio > high ? high : ratio);
      const Vector other = -normalised * clipped;
      d_log_probability[v] = chosen >= other ? chosen / REAL(B) : Vector{};
    }
  }
  if (divergence) *divergence = lane_sum(divergences) / B;
  Vector d_mean[A * NV];
  if constexpr (DISCRETE) {
    for (int v = 0; v < NV; ++v) {
      Vector log_p[A], negative_entropy = {};
      log_softmax(work.actor.output, v, log_p);
      for (int a = 0; a < A; ++a) negative_entropy += vector_exp(log_p[a]) * log_p[a];
      for (int a = 0; a < A; ++a) {
        const Vector p = vector_exp(log_p[a]);
        d_mean[a * NV + v] = d_log_probability[v] * (work.actions[a * NV + v] - p) +
                             p * (log_p[a] - negative_entropy) * (hyper.entropy_coefficient / B);
      }
    }
  }
  for (int a = 0; a < (DISCRETE ? 0 : A); ++a) {
    const REAL precision = scalar_exp(REAL(-2) * weights[LOG_STD + a]);
    Vector d_log_std = {};
    UNROLL for (int v = 0; v < NV; ++v) {
      const Vector error = work.actions[a * NV + v] - work.actor.output[a * NV + v];
      d_mean[a * NV + v] = d_log_probability[v] * error * precision;
      d_log_std += d_log_probability[v] * (error * error * precision - REAL(1));
    }
    out[LOG_STD + a] = lane_sum(d_log_std) - hyper.entropy_coefficient;
  }
  work.actor.backward(weights, work.x, d_mean, out);

  work.critic.forward(weights + CRITIC, work.x);
  Vector d_value[NV];
  UNROLL for (int v = 0; v < NV; ++v) {
    const Vector target = gather_scalar(rollouts.returns + k * steps, indices + v * LANES);
    const Vector error = work.critic.output[v] - target;
    if constexpr (!CLIP_VALUES) {
      d_value[v] = error * (hyper.value_coefficient / B);
      continue;
    }
    const Vector before = gather_scalar(rollouts.values + k * steps, indices + v * LANES);
    const Vector change = work.critic.output[v] - before;
    const Vector low = Vector{} - hyper.clip_coefficient, high = Vector{} + hyper.clip_coefficient;
    const Vector clipped_error = before + (change < low ? low : (change > high ? high : change)) - target;
    const auto inside = (change >= low) & (change <= high);
    const auto counts = inside | (error * error >= clipped_error * clipped_error);
    d_value[v] = counts ? error * (hyper.value_coefficient / B) : Vector{};
  }
  work.critic.backward(weights + CRITIC, work.x, d_value, out + CRITIC);
}

// Adam's step on parameters [first, last), whose gradient is scaled first.
INLINE void adam(int first, int last, REAL *__restrict w, REAL *__restrict m, REAL *__restrict s, const REAL *__restrict g,
                 REAL scale, REAL step, REAL root_correction, REAL epsilon) {
  for (int j = first; j < last; ++j) {
    const REAL clipped = g[j] * scale;
    m[j] = m[j] + (clipped - m[j]) * REAL(0.1);
    s[j] = s[j] * REAL(0.999) + clipped * clipped * REAL(0.001);
    w[j] -= step * m[j] / (std::sqrt(s[j]) * root_correction + epsilon);
  }
}

// `epochs` update epochs of every trial: clipped gradients and Adam, minibatch by minibatch of its permutations.
// permutations: (K, epochs, S); adam_steps: (K,), counted on; learning_rates: (K,), adapted where there is a desired_kl;
// going_on: (K,), a trial with 0 is left alone, and set to 0 where target_kl ends its epochs.
void update(int64_t trials, int64_t steps, int64_t epochs, REAL *parameters, REAL *first_moments, REAL *second_moments,
            int64_t *adam_steps, double *learning_rates, int64_t *going_on, Rollouts rollouts,
            const int32_t *permutations, Hyperparameters hyper) {
  alignas(64) static thread_local REAL g[padded(SIZE)];
  const bool watched = hyper.desired_kl > 0 || hyper.target_kl > 0;
  for (int64_t k = 0; k < trials; ++k) {
    REAL *w = parameters + k * SIZE, *m = first_moments + k * SIZE, *s = second_moments + k * SIZE;
    for (int64_t epoch = 0; epoch < epochs && going_on[k]; ++epoch) {
      const int32_t *permutation = permutations + (k * epochs + epoch) * steps;
      REAL divergence = 0, divergences = 0;
      for (int64_t start = 0; start < steps; start += B) {
        gradient(k, steps, w, rollouts, permutation + start, hyper, g, watched ? &divergence : nullptr);
        divergences += divergence;
        Vector squares[4] = {};
        for (int j = SIZE; j < padded(SIZE); ++j) g[j] = 0;
        for (int j = 0; j < padded(SIZE); j += LANES) {
          const Vector part = *reinterpret_cast<const Vector *>(g + j);
          squares[j / LANES % 4] += part * part;
        }
        const REAL norm = std::sqrt(lane_sum((squares[0] + squares[1]) + (squares[2] + squares[3])));
        const REAL scale = std::fmin(REAL(1), hyper.max_gradient_norm / (norm + REAL(1e-6)));
        const double t = static_cast<double>(++adam_steps[k]);
        const REAL step = REAL(learning_rates[k] / (1 - std::pow(0.9, t)));
        const REAL root_correction = REAL(1 / std::sqrt(1 - std::pow(0.999, t)));
        adam(0, CRITIC, w, m, s, g, scale, step * hyper.policy_rate_ratio, root_correction, hyper.adam_epsilon);
        adam(CRITIC, SIZE, w, m, s, g, scale, step, root_correction, hyper.adam_epsilon);
      }
      if (hyper.desired_kl > 0) {
        const REAL mean = divergences / (steps / B);
        double &rate = learning_rates[k];
        if (mean > 2 * hyper.desired_kl) rate = std::fmax(rate / FASTER, LEAST_RATE);
        if (mean < REAL(0.5) * hyper.desired_kl) rate = std::fmin(rate * FASTER, MOST_RATE);
      }
      if (hyper.target_kl > 0 && divergence > hyper.target_kl) going_on[k] = 0;
    }
  }
}

}  // extern "C"
