/* Linears on a CPU with AVX512-VNNI, see vnni.py: tokens are rounded to integers, and multiplied with unsigned codes
 * of the weight in int32, exactly. One instruction (vpdpbusd) multiplies four inputs of 16 rows with those of one row of
 * int8 codes. A token has one such row, or two where its integers have 16 bits: their upper and lower halves. Many tokens
 * are multiplied by AMX, where the processor has it.
 *
 * Without AVX512-VNNI this file defines nothing, and torch's ops take its place.
 */
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)

#include "amx_multiply.h"
#include "job.h"
#include "vnni_multiply.h"

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

static void blocks_of_part(const Job *job, int64_t part, int64_t parts, int64_t *begin, int64_t *end) {
    const int64_t pairs = (job->n + 2 * LANES - 1) / (2 * LANES), blocks = (job->n + LANES - 1) / LANES;
    *begin = 2 * (part * pairs / parts);
    *end = 2 * ((part + 1) * pairs / parts);
    if (*end > blocks) *end = blocks;
}

static void multiply_part(const Job *job, int64_t part, int64_t parts) {
    int64_t begin, end;
    blocks_of_part(job, part, parts, &begin, &end);
    uint8_t *panel = job->tiles ? (uint8_t *)job->tiles + tiles_bytes(job) + part * panel_bytes(job) : NULL;
#define MULTIPLY_BLOCKS(MODE)                                    \
    if (job->mode == MODE && panel)                              \
        amx_multiply_blocks(job, begin, end, panel, MODE);       \
    else if (job->mode == MODE)                                  \
        multiply_blocks(job, begin, end, MODE);
    MULTIPLY_BLOCKS(PLAIN)
    MULTIPLY_BLOCKS(GROUPED)
    MULTIPLY_BLOCKS(WIDE)
}

/* The weight in bf16 or fp32, inputs by rows, some neighbouring blocks at a time: what is written lies together. Block by
 * block, it would lie so far apart that it falls into few sets of the caches. */
#define TILE 16

/* 16 codes in the low bits of words, less their zero-point, times the scale: rounded once. */
INLINE __m512 dequantized(__m512i words, __m512 zero, __m512 scale) {
    if (BITS == 8) {
        const __m512i codes = _mm512_and_si512(words, _mm512_set1_epi32(255));
        return _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(codes), zero), scale);
    }
    /* What the four lowest bits of a word stand for: of a code of two bits, the two lowest. */
    const float one = BITS == 2 ? 0 : 4, two = BITS == 2 ? 0 : 8;
    const __m512 codes = _mm512_set_ps(3 + one + two, 2 + one + two, 1 + one + two, one + two, 3 + two, 2 + two, 1 + two,
                                       two, 3 + one, 2 + one, 1 + one, one, 3, 2, 1, 0);
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_permutexvar_ps(words, codes), zero), scale);
}

INLINE void store_pair(const Job *job, int64_t place, __m512 low, __m512 high) {
    if (job->out_type == FLOAT) {
        _mm512_storeu_ps((float *)job->out + place, low);
        _mm512_storeu_ps((float *)job->out + place + LANES, high);
        return;
    }
    /* The upper halves of all words. */
    uint16_t odd[2 * LANES];
    for (int i = 0; i < 2 * LANES; i++) odd[i] = (uint16_t)(2 * i + 1);
    const __m512i both = _mm512_permutex2var_epi16(rounded_to_bf16(low), _mm512_loadu_si512(odd), rounded_to_bf16(high));
    _mm512_storeu_si512((uint16_t *)job->out + place, both);
}

static void dequantize_tile(const Job *job, int64_t begin, int64_t end) {
    const int64_t blocks_of_group = job->k_blocks / job->groups, count = end - begin;
    __m512i packed[TILE];
    __m512 zero[TILE], scale[TILE];
    for (int64_t i = 0; i < job->k_blocks; i++) {
        for (int64_t block = 0; block < count; block++) {
            const int64_t whole = job->first_block + begin + block;
            packed[block] = _mm512_loadu_si512(job->weight + (whole * job->k_blocks + i) * 64);
            if (i % blocks_of_group) continue;
            const int64_t column = i / blocks_of_group * job->scale_stride + whole * LANES;
            scale[block] = scale_of(job, column, WIDE);
            zero[block] = _mm512_cvtepi32_ps(zero_of(job, column, WIDE));
        }
        for (int64_t input = 0; input < 4 * PLANES; input++) {
            const __m512i shift = _mm512_set1_epi32((int)(8 * (input % 4) + BITS * (input / 4)));
            int64_t place = (i * 4 * PLANES + input) * job->out_stride + begin * LANES, block = 0;
            for (; block + 1 < count; block += 2, place += 2 * LANES) {
                const __m512i low = _mm512_srlv_epi32(packed[block], shift);
                const __m512i high = _mm512_srlv_epi32(packed[block + 1], shift);
                store_pair(job, place, dequantized(low, zero[block], scale[block]),
                           dequantized(high, zero[block + 1], scale[block + 1]));
            }
            if (block == count) continue;
            const __m512 last = dequantized(_mm512_srlv_epi32(packed[block], shift), zero[block], scale[block]);
            if (job->out_type == FLOAT)
                _mm512_storeu_ps((float *)job->out + place, last);
            else
                _mm256_storeu_si256((__m256i *)((uint16_t *)job->out + place), to_bf16(last));
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
    Job own = *job;
    const int amx = job->weight && takes_amx(job);
    /* Without memory AVX512-VNNI multiplies. */
    if (amx) own.tiles = aligned_alloc(64, (size_t)(tiles_bytes(job) + job->threads * panel_bytes(job)));
    const int wide = job->mode == WIDE, needed = job->x || job->mode == GROUPED, done = job->rounded && !(amx && wide);
    if (needed && !done && !(own.tiles && wide)) run(job, tokens_part, job->m * job->k, job->values_per_thread);
    if (own.tiles) run(&own, tiles_part, job->m * job->k, job->values_per_thread);
    if (job->weight) run(&own, multiply_part, job->m * products, job->products_per_thread);
    free(own.tiles);
    return 0;
}

/* Whether AMX multiplies here: the processor has it, the compiler knows it, and the system lets this process use it. */
int sliderquant_has_amx(void) { return has_amx(); }

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
