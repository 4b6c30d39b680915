/* Linears on a CPU with AVX512-VNNI, see cpu_vnni.py: tokens are rounded to integers, and multiplied with unsigned codes
 * of the weight in int32, exactly. One instruction (vpdpbusd) multiplies four inputs of 16 rows with those of one row of
 * int8 codes. A token has one such row, or two where its integers have 16 bits: their upper and lower halves.
 *
 * Without AVX512-VNNI this file defines nothing, and torch's ops take its place.
 */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

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
    int64_t values_per_thread, products_per_thread; /* less takes less time than waking another thread does */
    float clip_low, clip_high;
    int32_t x_type, x_bits, x_symmetric, shift, mode, out_type, threads;
    /* GOMP_parallel, omp_get_thread_num and omp_get_num_threads of the OpenMP runtime that torch has loaded: one of our own
     * would compete with it for the cores. NULL: one thread. */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned);
    int (*number)(void), (*count)(void);
} Job;

typedef void (*Part)(const Job *job, int64_t part, int64_t parts);

typedef struct {
    const Job *job;
    Part part;
} Shared;

INLINE __m512 from_bf16(__m256i bits) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

/* To nearest, ties to even. Not the instruction of AVX512-BF16, which takes denormals for 0. */
INLINE __m256i to_bf16(__m512 value) {
    const __m512i word = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __m512 load(const void *from, int64_t at, int32_t type, __mmask16 mask) {
    if (type == FLOAT) return _mm512_maskz_loadu_ps(mask, (const float *)from + at);
    return from_bf16(_mm256_maskz_loadu_epi16(mask, (const uint16_t *)from + at));
}

INLINE __mmask16 first(int64_t lanes) { return lanes >= LANES ? 0xffff : (__mmask16)((1u << lanes) - 1); }

/* One token to 4 or 8 bits, by the formulas of activations.py. */
static void quantize_token(const Job *job, int64_t token) {
    const int64_t k = job->k, start = token * job->x_stride;
    int8_t *codes = job->codes + token * job->code_stride;
    __m512 lows = _mm512_setzero_ps(), highs = _mm512_setzero_ps();
    for (int64_t i = 0; i < k; i += LANES) {
        const __m512 value = load(job->x, start + i, job->x_type, first(k - i));
        lows = _mm512_min_ps(lows, value);
        highs = _mm512_max_ps(highs, value);
    }
    const float low = _mm512_reduce_min_ps(lows) * job->clip_low, high = _mm512_reduce_max_ps(highs) * job->clip_high;
    const float lowest = -(float)(1 << (job->x_bits - 1)), highest = -lowest - 1, steps = highest - lowest;
    float scale, zero = 0;
    if (job->x_symmetric) {
        scale = (-low > high ? -low : high) / (steps / 2);
    } else {
        scale = (high - low) / steps;
    }
    if (!(scale > 0)) {
        scale = 1;
    } else if (!job->x_symmetric) {
        zero = _mm_cvtss_f32(_mm_round_ss(_mm_setzero_ps(), _mm_set_ss(lowest - low / scale), 8));
        zero = zero < lowest ? lowest : zero > highest ? highest : zero;
    }
    const __m512 by = _mm512_set1_ps(scale), shift = _mm512_set1_ps(zero);
    const __m512 least = _mm512_set1_ps(lowest), most = _mm512_set1_ps(highest);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = 0; i < k; i += LANES) {
        const __mmask16 mask = first(k - i);
        const __m512 value = load(job->x, start + i, job->x_type, mask);
        __m512 code = _mm512_add_ps(_mm512_roundscale_ps(_mm512_div_ps(value, by), 8), shift);
        code = _mm512_min_ps(_mm512_max_ps(code, least), most);
        const __m512i whole = _mm512_maskz_cvtps_epi32(mask, code);
        sum = _mm512_add_epi32(sum, whole);
        _mm_mask_storeu_epi8(codes + i, mask, _mm512_cvtepi32_epi8(whole));
    }
    memset(codes + k, 0, (size_t)(job->code_stride - k));
    job->x_scale[token] = scale;
    if (job->x_zero) job->x_zero[token] = (int32_t)zero;
    job->x_sum[token] = _mm512_reduce_add_epi32(sum);
}

static void sum_groups(const Job *job, int64_t token) {
    const int64_t width = job->k / job->groups;
    const int8_t *codes = job->codes + token * job->code_stride;
    for (int64_t group = 0; group < job->groups; group++) {
        int32_t sum = 0;
        for (int64_t i = group * width; i < (group + 1) * width; i++) sum += codes[i];
        job->group_sum[token * job->groups + group] = sum;
    }
}

/* One token to 16 bits with a scale for each group of inputs, which are a multiple of 32. A group that is not finite has
 * the scale NaN, which its token's outputs become. */
static void split_token(const Job *job, int64_t token) {
    const int64_t width = job->k / job->groups, start = token * job->x_stride;
    int8_t *upper = job->codes + 2 * token * job->code_stride, *lower = upper + job->code_stride;
    const __m512 limit = _mm512_set1_ps(FLT_MAX);
    for (int64_t group = 0; group < job->groups; group++) {
        __m512 largest = _mm512_setzero_ps();
        __mmask16 finite = 0xffff;
        for (int64_t i = group * width; i < (group + 1) * width; i += LANES) {
            const __m512 size = _mm512_abs_ps(load(job->x, start + i, job->x_type, 0xffff));
            finite &= _mm512_cmp_ps_mask(size, limit, _CMP_LE_OQ);
            largest = _mm512_max_ps(largest, size);
        }
        float scale = _mm512_reduce_max_ps(largest) / LARGEST;
        if (scale < FLT_MIN) scale = FLT_MIN;
        const __m512 by = _mm512_set1_ps(scale);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t i = group * width; i < (group + 1) * width; i += LANES) {
            const __m512i whole = _mm512_cvtps_epi32(_mm512_div_ps(load(job->x, start + i, job->x_type, 0xffff), by));
            const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8);
            sum = _mm512_add_epi32(sum, whole);
            _mm_storeu_si128((__m128i *)(upper + i), _mm512_cvtepi32_epi8(high));
            _mm_storeu_si128((__m128i *)(lower + i), _mm512_cvtepi32_epi8(whole));
        }
        job->x_scale[token * job->groups + group] = finite == 0xffff ? scale : NAN;
        job->group_sum[token * job->groups + group] = _mm512_reduce_add_epi32(sum);
    }
}

static void tokens_part(const Job *job, int64_t part, int64_t parts) {
    for (int64_t token = part * job->m / parts; token < (part + 1) * job->m / parts; token++) {
        if (job->mode == WIDE) {
            split_token(job, token);
            continue;
        }
        if (job->x) quantize_token(job, token);
        if (job->group_sum) sum_groups(job, token);
    }
}

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
                const __m512i of_zero = _mm512_mullo_epi32(_mm512_set1_epi32(job->group_sum[place]), zero);
                __m512i sum = sums[r][t];
                __m512 by = scale;
                if (mode == WIDE) {
                    sum = _mm512_add_epi32(_mm512_slli_epi32(sums[r][2 * t], 8), sums[r][2 * t + 1]);
                    by = _mm512_mul_ps(scale, _mm512_set1_ps(job->x_scale[place]));
                }
                const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, of_zero)), by);
                totals[r][t] = _mm512_add_ps(totals[r][t], part);
            }
        }
    }
    for (int r = 0; r < blocks; r++) {
        const int64_t column = at + r * LANES, out_row = (block + r) * LANES;
        for (int t = 0; t < tokens; t++) {
            __m512 y;
            if (mode == WIDE) {
                y = totals[r][t];
            } else if (mode == GROUPED) {
                y = totals[r][t];
                if (job->x_zero) {
                    const __m512 last = _mm512_loadu_ps((const float *)job->last + column);
                    y = _mm512_sub_ps(y, _mm512_mul_ps(_mm512_set1_ps((float)job->x_zero[token + t]), last));
                }
                y = _mm512_mul_ps(y, _mm512_set1_ps(job->x_scale[token + t]));
            } else {
                const __m512i x_sum = _mm512_set1_epi32(job->x_sum[token + t]);
                __m512i sum = _mm512_sub_epi32(sums[r][t], _mm512_mullo_epi32(x_sum, zero_of(job, column, mode)));
                if (job->x_zero) {
                    const __m512i x_zero = _mm512_set1_epi32(job->x_zero[token + t]);
                    sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_zero, _mm512_loadu_si512(job->last + column)));
                }
                const __m512 by = _mm512_mul_ps(_mm512_set1_ps(job->x_scale[token + t]), scale_of(job, column, mode));
                y = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), by);
            }
            store(job, (token + t) * job->n + out_row, out_row, y);
        }
    }
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

static void blocks_of_part(const Job *job, int64_t part, int64_t parts, int64_t *begin, int64_t *end) {
    const int64_t pairs = (job->n + 2 * LANES - 1) / (2 * LANES), blocks = (job->n + LANES - 1) / LANES;
    *begin = 2 * (part * pairs / parts);
    *end = 2 * ((part + 1) * pairs / parts);
    if (*end > blocks) *end = blocks;
}

static void multiply_part(const Job *job, int64_t part, int64_t parts) {
    int64_t begin, end;
    blocks_of_part(job, part, parts, &begin, &end);
    if (job->mode == PLAIN) multiply_blocks(job, begin, end, PLAIN);
    if (job->mode == GROUPED) multiply_blocks(job, begin, end, GROUPED);
    if (job->mode == WIDE) multiply_blocks(job, begin, end, WIDE);
}

/* The weight in bf16 or fp32, inputs by rows, some neighbouring blocks at a time: what is written lies together. Block by
 * block, it would lie so far apart that it falls into few sets of the caches. */
#define TILE 16

static void dequantize_tile(const Job *job, int64_t begin, int64_t end) {
    const int64_t blocks_of_group = job->k_blocks / job->groups;
    const __m512i code = _mm512_set1_epi32((1 << BITS) - 1);
    __m512i packed[TILE], zero[TILE];
    __m512 scale[TILE];
    for (int64_t i = 0; i < job->k_blocks; i++) {
        for (int64_t block = begin; block < end; block++) {
            const int64_t whole = job->first_block + block;
            packed[block - begin] = _mm512_loadu_si512(job->weight + (whole * job->k_blocks + i) * 64);
            if (i % blocks_of_group) continue;
            const int64_t column = i / blocks_of_group * job->scale_stride + whole * LANES;
            zero[block - begin] = zero_of(job, column, WIDE);
            scale[block - begin] = scale_of(job, column, WIDE);
        }
        for (int64_t input = 0; input < 4 * PLANES; input++) {
            const __m512i shift = _mm512_set1_epi32((int)(8 * (input % 4) + BITS * (input / 4)));
            const int64_t place = (i * 4 * PLANES + input) * job->out_stride;
            for (int64_t block = begin; block < end; block++) {
                const __m512i whole = _mm512_and_si512(_mm512_srlv_epi32(packed[block - begin], shift), code);
                const __m512i steps = _mm512_sub_epi32(whole, zero[block - begin]);
                const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(steps), scale[block - begin]);
                if (job->out_type == FLOAT)
                    _mm512_storeu_ps((float *)job->out + place + block * LANES, value);
                else
                    _mm256_storeu_si256((__m256i *)((uint16_t *)job->out + place + block * LANES), to_bf16(value));
            }
        }
    }
}

static void dequantize_part(const Job *job, int64_t part, int64_t parts) {
    int64_t begin, end;
    blocks_of_part(job, part, parts, &begin, &end);
    for (; begin < end; begin += TILE) dequantize_tile(job, begin, end - begin < TILE ? end : begin + TILE);
}

static void run_thread(void *argument) {
    const Shared *shared = argument;
    shared->part(shared->job, shared->job->number(), shared->job->count());
}

static void run(const Job *job, Part part, int64_t work, int64_t least) {
    int64_t threads = job->parallel ? work / least : 1;
    if (threads > job->threads) threads = job->threads;
    if (threads > 1) {
        Shared shared = {job, part};
        job->parallel(run_thread, &shared, (unsigned)threads, 0);
    } else {
        part(job, 0, 1);
    }
}

/* Rounds the tokens, unless they are, then multiplies them with the weight, if there is one; or dequantizes the weight. */
int sliderquant_vnni(const Job *job) {
    const int64_t products = job->n * job->k;
    if (job->out_stride) {
        run(job, dequantize_part, products, job->products_per_thread);
        return 0;
    }
    if (job->x || job->mode == GROUPED) run(job, tokens_part, job->m * job->k, job->values_per_thread);
    if (job->weight) run(job, multiply_part, job->m * products, job->products_per_thread);
    return 0;
}

/* The job for m tokens x [m, k], rounded into memory that is needed no longer than that. Returns 1 without memory. */
int sliderquant_vnni_linear(const Job *job, const void *x, int64_t m, void *out, int32_t threads) {
    Job own = *job;
    const int64_t of_groups = job->mode == PLAIN ? 0 : 4 * m * job->groups, rows = job->mode == WIDE ? 2 * m : m;
    char *memory = malloc((size_t)(12 * m + 2 * of_groups + rows * job->code_stride + 64));
    if (!memory) return 1;
    own.x = x, own.m = m, own.x_stride = job->k, own.out = out, own.threads = threads;
    own.x_sum = (int32_t *)memory;
    own.x_zero = job->x_symmetric ? NULL : own.x_sum + m;
    own.group_sum = job->mode == PLAIN ? NULL : own.x_sum + 2 * m;
    own.x_scale = (float *)(memory + 8 * m + of_groups);
    own.codes = (int8_t *)own.x_scale + (job->mode == WIDE ? of_groups : 4 * m);
    sliderquant_vnni(&own);
    free(memory);
    return 0;
}

#endif
