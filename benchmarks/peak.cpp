// The processor's peak of fused multiply-adds in float32: more chains than an instruction's latency times its rate.
constexpr int CHAINS = 24, LANES = 16;
typedef float Lanes __attribute__((vector_size(4 * LANES)));

// Runs so many rounds of one multiply-add in each lane of each chain; the sum keeps the compiler from leaving them out.
extern "C" float multiply_add(long rounds, float factor, float term) {
    Lanes chains[CHAINS];
    Lanes factors = Lanes{} + factor, terms = Lanes{} + term;
    for (int chain = 0; chain < CHAINS; chain++) chains[chain] = Lanes{} + static_cast<float>(chain);
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 24
        for (int chain = 0; chain < CHAINS; chain++) chains[chain] = chains[chain] * factors + terms;
    }
    float sum = 0;
    for (int chain = 0; chain < CHAINS; chain++)
        for (int lane = 0; lane < LANES; lane++) sum += chains[chain][lane];
    return sum;
}

extern "C" long operations_of_a_round() { return 2L * CHAINS * LANES; }
