/* What the loops of vnni.c have in common: a job, and what the sums of integers mean. */
#ifndef SLIDERQUANT_CPU_JOB_H
#define SLIDERQUANT_CPU_JOB_H

#include <float.h>
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* BITS: of the codes, 2, 4 or 8; defined by the command line: a library for each takes a third of the time to compile. */
#define PLANES (8 / BITS)
#define LANES 16
#define LARGEST 32512 /* of 16-bit integers: the upper half of its sum with 128 is an int8 */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT = 0, BFLOAT16 = 1 };
/* Sums of codes have one scale; one a group of the weight; or, of 16-bit integers, one a group of the token as well. */
enum { PLAIN = 0, GROUPED = 1, WIDE = 2 };

typedef struct {
    /* The tokens: x [m, .], or codes that are there already. */
    const void *x;
    int8_t *codes;      /* [m, code_stride], wide [m, 2, code_stride]; 0 from k to the end of the weight's last block */
    float *x_scale;     /* [m], wide [m, groups] */
    int32_t *x_zero;    /* [m]; NULL: all 0 */
    int32_t *x_sum;     /* [m], sums of codes; not wide */
    int32_t *group_sum; /* [m, groups], sums by group, written here; NULL: plain */
    /* The weight, see low_bit_layout.py and layout.py. NULL: only the tokens are rounded. */
    const uint8_t *weight; /* [row blocks, k_blocks, 64] */
    const void *scale;     /* [groups, padded] fp32, wide: bf16 */
    const void *zero;      /* [groups, padded] int32, wide: uint8, or NULL: all 0 */
    const int32_t *last;   /* [padded]: what the tokens' zero-points need, int32 or, grouped, the bits of an fp32 */
    const void *bias;      /* [n] or NULL */
    const void *residual;  /* [m, n] or NULL */
    void *out;             /* [m, n], or [k, out_stride] for the dequantized weight; out_stride is 0 but for that */
    int64_t m, k, x_stride, code_stride, first_block, n, scale_stride, k_blocks, groups, out_stride;
    int64_t amx_tokens; /* from which AMX multiplies, where there is one; 0: never */
    int64_t values_per_thread, products_per_thread; /* less takes less time than waking another thread does */
    float clip_low, clip_high;
    int32_t x_type, x_bits, x_symmetric, shift, mode, out_type, threads;
    int32_t rounded; /* the codes of x are there already */
    /* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime that torch has loaded: one of our own
     * would compete with it for the cores. NULL: one thread. */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void), (*count)(void);
    char *tiles; /* the tokens as amx_multiply.h takes them, then a panel of the weight for each thread, or NULL */
} Job;

typedef void (*Part)(const Job *job, int64_t part, int64_t parts);

typedef struct {
    const Job *job;
    Part part;
} Shared;

INLINE __m512 from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* To nearest, ties to even, in the upper halves of words. Not the instruction of AVX512-BF16, which takes denormals for
 * 0. */
INLINE __m512i rounded_to_bf16(__m512 value) {
    const __m512i word = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
}

INLINE __m256i to_bf16(__m512 value) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded_to_bf16(value), 16)); }

INLINE __m512 load(const void *from, int64_t at, int32_t type, __mmask16 mask) {
    if (type == FLOAT) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    return from_bf16(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at));
}

INLINE __mmask16 first(int64_t lanes) { return lanes >= LANES ? 0xffff : (__mmask16)((1u << lanes) - 1); }

/* The zero-points of 16 rows in a group. */
INLINE __m512i zero_of(const Job *job, int64_t column, const int mode) {
    const __m512i shift = _mm512_set1_epi32(job->shift);
    if (!job->zero) return shift;
    if (mode == WIDE) {
        const uint8_t *zero = (const uint8_t *)job->zero + column;
        return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)zero));
    }
    return _mm512_add_epi32(_mm512_loadu_si512((const int32_t *)job->zero + column), shift);
}

INLINE __m512 scale_of(const Job *job, int64_t column, const int mode) {
    return load(job->scale, column, mode == WIDE ? BFLOAT16 : FLOAT, 0xffff);
}

INLINE void store(const Job *job, int64_t place, int64_t row, __m512 y) {
    const __mmask16 mask = first(job->n - row);
    if (job->bias) y = _mm512_add_ps(y, load(job->bias, row, job->out_type, mask));
    if (job->residual) y = _mm512_add_ps(y, load(job->residual, place, job->out_type, mask));
    if (job->out_type == FLOAT)
        _mm512_mask_storeu_ps((float *)job->out + place, mask, y);
    else
        _mm256_mask_storeu_epi16((uint16_t *)job->out + place, mask, to_bf16(y));
}

/* The sum of a group of inputs, of 16 rows, added to the total of a token. `sum`: of 8-bit codes or of upper halves, and
 * `lower` of lower halves; `has_zero`: zero-points have yet to be subtracted. `place`: of the token's group. */
INLINE __m512 add_group(const Job *job, __m512 total, __m512i sum, __m512i lower, int64_t place, __m512i zero,
                        __m512 scale, const int has_zero, const int mode) {
    __m512 by = scale;
    if (mode == WIDE) {
        sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), lower);
        by = _mm512_mul_ps(scale, _mm512_set1_ps(job->x_scale[place]));
    }
    if (has_zero) sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(job->group_sum[place]), zero));
    return _mm512_add_ps(total, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by));
}

/* 16 outputs of a token from the total of its groups or, plain, from the sum of its codes. `column`: of the first in the
 * weight's scales; `row`: of the first in the result. */
INLINE void finish(const Job *job, __m512 total, __m512i sum, int64_t token, int64_t column, int64_t row,
                   const int mode) {
    if (mode == GROUPED) {
        if (job->x_zero) {
            const __m512 last = _mm512_loadu_ps((const float *)job->last + column);
            total = _mm512_sub_ps(total, _mm512_mul_ps(_mm512_set1_ps((float)job->x_zero[token]), last));
        }
        total = _mm512_mul_ps(total, _mm512_set1_ps(job->x_scale[token]));
    }
    if (mode == PLAIN) {
        const __m512i x_sum = _mm512_set1_epi32(job->x_sum[token]);
        sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_sum, zero_of(job, column, mode)));
        if (job->x_zero) {
            const __m512i x_zero = _mm512_set1_epi32(job->x_zero[token]);
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_zero, _mm512_loadu_si512(job->last + column)));
        }
        const __m512 by = _mm512_mul_ps(_mm512_set1_ps(job->x_scale[token]), scale_of(job, column, mode));
        total = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by);
    }
    store(job, token * job->n + row, row, total);
}

#endif
