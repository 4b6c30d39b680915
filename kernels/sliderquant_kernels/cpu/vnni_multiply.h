/* Products of codes by AVX512-VNNI. */
#ifndef SLIDERQUANT_CPU_VNNI_MULTIPLY_H
#define SLIDERQUANT_CPU_VNNI_MULTIPLY_H

#include "job.h"

/* Products of some rows of codes with `blocks` blocks of 16 rows of the weight. All arguments from `blocks` on are
 * constants where this is called. */
INLINE void multiply_tile(const Job *job, int64_t block, int64_t row, const int blocks, const int rows,
                          const int mode) {
    const int tokens = mode == WIDE ? rows / 2 : rows;
    const __m512i codes_of_plane = _mm512_set1_epi8((char)((1 << BITS) - 1));
    const int64_t bytes = job->k_blocks * 64, at = (job->first_block + block) * LANES;
    const int64_t token = mode == WIDE ? row / 2 : row;
    const uint8_t *weight = job->weight + (job->first_block + block) * bytes;
    const int8_t *codes = job->codes + row * job->code_stride;
    const int64_t groups = mode == PLAIN ? 1 : job->groups, blocks_of_group = job->k_blocks / groups;
    __m512i sums[4][8];
    __m512 totals[4][8];
    for (int r = 0; r < blocks; r++)
        for (int t = 0; t < rows; t++) totals[r][t] = _mm512_setzero_ps();
    for (int64_t group = 0; group < groups; group++) {
        for (int r = 0; r < blocks; r++)
            for (int t = 0; t < rows; t++) sums[r][t] = _mm512_setzero_si512();
        for (int64_t i = group * blocks_of_group; i < (group + 1) * blocks_of_group; i++) {
            __m512i packed[4];
            for (int r = 0; r < blocks; r++) packed[r] = _mm512_loadu_si512(weight + r * bytes + i * 64);
            for (int plane = 0; plane < PLANES; plane++) {
                __m512i w[4];
                for (int r = 0; r < blocks; r++) {
                    w[r] = plane ? _mm512_srli_epi16(packed[r], (unsigned)(plane * BITS)) : packed[r];
                    if (BITS < 8) w[r] = _mm512_and_si512(w[r], codes_of_plane);
                }
                for (int t = 0; t < rows; t++) {
                    int32_t four;
                    memcpy(&four, codes + t * job->code_stride + 4 * (i * PLANES + plane), 4);
                    const __m512i x = _mm512_set1_epi32(four);
                    for (int r = 0; r < blocks; r++) sums[r][t] = _mm512_dpbusd_epi32(sums[r][t], w[r], x);
                }
            }
        }
        for (int r = 0; r < blocks && mode != PLAIN; r++) {
            const int64_t column = group * job->scale_stride + at + r * LANES;
            const __m512i zero = zero_of(job, column, mode);
            const __m512 scale = scale_of(job, column, mode);
            for (int t = 0; t < tokens; t++) {
                const int64_t place = (token + t) * groups + group;
                const __m512i sum = sums[r][mode == WIDE ? 2 * t : t], lower = sums[r][mode == WIDE ? 2 * t + 1 : t];
                totals[r][t] = add_group(job, totals[r][t], sum, lower, place, zero, scale, 1, mode);
            }
        }
    }
    for (int r = 0; r < blocks; r++)
        for (int t = 0; t < tokens; t++)
            finish(job, totals[r][t], sums[r][t], token + t, at + r * LANES, (block + r) * LANES, mode);
}

/* All rows of codes in a range with the blocks of a part, so many at a time as accumulators fit into registers. */
#define ROWS(COUNT, BLOCKS)                                                                                    \
    for (; end - row >= COUNT; row += COUNT) {                                                                 \
        int64_t block = begin_block;                                                                           \
        for (; end_block - block >= BLOCKS; block += BLOCKS)                                                   \
            multiply_tile(job, block, row, BLOCKS, COUNT, mode);                                         \
        for (; block < end_block; block++) multiply_tile(job, block, row, 1, COUNT, mode);               \
    }

INLINE void multiply_range(const Job *job, int64_t begin_block, int64_t end_block, int64_t row, int64_t end,
                           const int mode) {
    ROWS(8, 2)
    ROWS(4, 4)
    ROWS(2, 4)
    if (mode != WIDE) ROWS(1, 4)
}

/* A part of the weight at a time so small that it stays in the L1 cache while all tokens pass; so many tokens that their
 * codes stay in the L2 cache while all of the weight passes. */
#define L1_BYTES 16384
#define L2_BYTES 393216

INLINE void multiply_blocks(const Job *job, int64_t begin, int64_t end, const int mode) {
    const int64_t all = mode == WIDE ? 2 * job->m : job->m;
    int64_t step = all < 8 ? end - begin : L1_BYTES / (job->k_blocks * 64) / 2 * 2;
    int64_t rows = L2_BYTES / job->code_stride / 8 * 8;
    if (step < 2) step = 2;
    if (rows < 8) rows = 8;
    for (int64_t row = 0; row < all; row += rows) {
        const int64_t last = all - row < rows ? all : row + rows;
        for (int64_t block = begin; block < end; block += step)
            multiply_range(job, block, end - block < step ? end : block + step, row, last, mode);
    }
}

#endif
