/* @headline@ */

#include "model.h"

#ifdef __FAST_MATH__
#error "-ffast-math rounds otherwise than the network was made for: leave it out"
#endif

/* A map is row by row, its channels innermost. A convolution takes what its kernel covers beside the map for 0. */
struct size {
    int in_side, in_channels; /* of the map that is read */
    int side, channels;       /* of the map that is written */
    int kernel, stride, padding;
};

/* Where the kernel lies for an output at some row, or column: it begins at `start` of the map, and its rows from
 * `first` to below `last` are on the map. */
struct span {
    int start, first, last;
};

static struct span on_map(const struct size *size, int position)
{
    struct span span = {position * size->stride - size->padding, 0, size->kernel};
    if (span.start < 0)
        span.first = -span.start < size->kernel ? -span.start : size->kernel;
    if (span.start + size->kernel > size->in_side)
        span.last = size->in_side - span.start;
    if (span.last < span.first)
        span.last = span.first;
    return span;
}

int model_class(const float logits[MODEL_CLASSES])
{
    int best = 0;
    for (int i = 1; i < MODEL_CLASSES; i++)
        if (logits[i] > logits[best])
            best = i;
    return best;
}

/* A pixel of a row; beside it there is nothing. */
static int pixel(const uint8_t *row, int column)
{
    return column < 0 || column >= MODEL_SIDE ? 0 : row[column];
}

/* The largest whole number that is not above x. */
static int32_t whole(double x)
{
    const int32_t n = (int32_t)x;
    return x < n ? n - 1 : n;
}

/* How far a row is moved, in sixteenths of a pixel, for each row below the centre of mass: until the ink's rows and
 * columns are not correlated. Sums of whole numbers are exact, so that the image is everywhere the same. */
static double slope_of(const uint8_t *x, double *centre)
{
    int32_t mass = 0, rows = 0, columns = 0, products = 0, squares = 0;
    for (int row = 0; row < MODEL_SIDE; row++) {
        for (int column = 0; column < MODEL_SIDE; column++) {
            const int32_t ink = *x++;
            mass += ink;
            rows += ink * row;
            columns += ink * column;
            products += ink * row * column;
            squares += ink * row * row;
        }
    }
    mass += mass == 0;
    const int64_t covariance = (int64_t)mass * products - (int64_t)rows * columns;
    const int64_t variance = (int64_t)mass * squares - (int64_t)rows * rows;
    const double slope = (double)covariance / (double)(variance < 1 ? 1 : variance);
    *centre = (double)rows / (double)mass;
    return 16 * (slope < -2 ? -2 : slope > 2 ? 2 : slope);
}

/* Slanted writing upright. */
static void deskew(const uint8_t *x, uint8_t *y)
{
    double centre;
    const double slope = slope_of(x, &centre);
    for (int row = 0; row < MODEL_SIDE; row++, x += MODEL_SIDE) {
        const double below = row - centre;
        const double moved = slope * below;
        const int32_t shift = whole(moved + 0.5);
        const int32_t pixels = whole(shift / 16.0), part = shift - 16 * pixels;
        for (int column = 0; column < MODEL_SIDE; column++) {
            const int left = pixel(x, column + pixels), right = pixel(x, column + pixels + 1);
            *y++ = (uint8_t)(((16 - part) * left + part * right + 8) / 16);
        }
    }
}

/* ---- int8: maps of unsigned bytes, weights of signed ones, sums of 32 bits ---- */

struct int8_layer {
    struct size size;
    int zero_in, zero;       /* the bytes that stand for 0 in the maps that are read and written */
    const int8_t *weights;   /* [channels][kernel][kernel][in_channels]; depthwise: [kernel][kernel][channels] */
    const int32_t *bias;     /* [channels]; without padding zero_in is in it already, and 0 above */
    const float *multiplier; /* [channels], from a sum to a byte */
};

/* To the nearest byte, half to even: a float that is larger than 2^23 has no fraction. */
static uint8_t to_byte(int32_t sum, float multiplier, int zero)
{
    const float lowest = (float)(0 - zero), highest = (float)(255 - zero);
    float y = (float)sum * multiplier;
    y = y < lowest ? lowest : y > highest ? highest : y;
    y += 12582912.0f; /* 3 * 2^22 */
    return (uint8_t)((int32_t)(y - 12582912.0f) + zero);
}

static int32_t dot_int8(const uint8_t *x, const int8_t *weights, int n)
{
    int32_t sum = 0;
    for (; n >= 4; n -= 4, x += 4, weights += 4)
        sum += x[0] * weights[0] + x[1] * weights[1] + x[2] * weights[2] + x[3] * weights[3];
    for (; n > 0; n--)
        sum += *x++ * *weights++;
    return sum;
}

static int32_t sum_int8(const int8_t *weights, int n)
{
    int32_t sum = 0;
    for (; n > 0; n--)
        sum += *weights++;
    return sum;
}

static void convolution_int8(const struct int8_layer *layer, const uint8_t *x, uint8_t *y)
{
    const struct size *size = &layer->size;
    const int n = size->in_channels;
    for (int row = 0; row < size->side; row++) {
        const struct span rows = on_map(size, row);
        for (int column = 0; column < size->side; column++) {
            const struct span columns = on_map(size, column);
            const int width = (columns.last - columns.first) * n;
            for (int channel = 0; channel < size->channels; channel++) {
                int32_t sum = layer->bias[channel];
                for (int i = rows.first; i < rows.last && width > 0; i++) {
                    const int at = (rows.start + i) * size->in_side + columns.start + columns.first;
                    const int tap = (channel * size->kernel + i) * size->kernel + columns.first;
                    sum += dot_int8(x + at * n, layer->weights + tap * n, width);
                    if (layer->zero_in != 0)
                        sum -= layer->zero_in * sum_int8(layer->weights + tap * n, width);
                }
                *y++ = to_byte(sum, layer->multiplier[channel], layer->zero);
            }
        }
    }
}

static void depthwise_int8(const struct int8_layer *layer, const uint8_t *x, uint8_t *y)
{
    const struct size *size = &layer->size;
    const int n = size->channels;
    for (int row = 0; row < size->side; row++) {
        const struct span rows = on_map(size, row);
        for (int column = 0; column < size->side; column++) {
            const struct span columns = on_map(size, column);
            for (int channel = 0; channel < n; channel++) {
                int32_t sum = layer->bias[channel];
                for (int i = rows.first; i < rows.last; i++) {
                    int at = ((rows.start + i) * size->in_side + columns.start + columns.first) * n + channel;
                    int tap = (i * size->kernel + columns.first) * n + channel;
                    for (int j = columns.first; j < columns.last; j++, at += n, tap += n)
                        sum += (x[at] - layer->zero_in) * layer->weights[tap];
                }
                *y++ = to_byte(sum, layer->multiplier[channel], layer->zero);
            }
        }
    }
}

/* The largest of 2x2; an odd last row or column is left out. */
static void max_pool_int8(int in_side, int channels, const uint8_t *x, uint8_t *y)
{
    const int below = in_side * channels;
    for (int row = 0; row + 1 < in_side; row += 2) {
        for (int column = 0; column + 1 < in_side; column += 2) {
            const uint8_t *corner = x + (row * in_side + column) * channels;
            for (int channel = 0; channel < channels; channel++, corner++) {
                uint8_t above = corner[0] > corner[channels] ? corner[0] : corner[channels];
                uint8_t under = corner[below] > corner[below + channels] ? corner[below] : corner[below + channels];
                *y++ = above > under ? above : under;
            }
        }
    }
}

/* The mean over the map: the multiplier divides by the number of its pixels. */
static void mean_int8(int in_side, int channels, int zero_in, int zero, float multiplier, const uint8_t *x,
                      uint8_t *y)
{
    const int n = in_side * in_side;
    for (int channel = 0; channel < channels; channel++) {
        int32_t sum = -n * zero_in;
        for (int i = 0; i < n; i++)
            sum += x[i * channels + channel];
        *y++ = to_byte(sum, multiplier, zero);
    }
}

/* What an activation that is a table makes of a map. */
static void look_up_int8(int n, const uint8_t table[256], uint8_t *maps)
{
    for (int i = 0; i < n; i++)
        maps[i] = table[maps[i]];
}

@int8_constants@

void model_int8(const uint8_t pixels[MODEL_PIXELS], float logits[MODEL_CLASSES])
{
    static uint8_t maps[@int8_size@];
@int8_layers@
    for (int i = 0; i < MODEL_CLASSES; i++)
        logits[i] = (float)(maps[@int8_last@i] - @int8_zero@) * @int8_scale@;
}

/* ---- float32 ---- */

struct float_layer {
    struct size size;
    int is_rectified;     /* whether what is below 0 becomes 0 */
    const float *weights; /* in the order of the int8 ones */
    const float *bias;    /* [channels] */
};

static float activation(const struct float_layer *layer, float sum)
{
    return layer->is_rectified && sum < 0.0f ? 0.0f : sum;
}

static float dot_float(const float *x, const float *weights, int n)
{
    float sum = 0.0f;
    for (; n > 0; n--)
        sum += *x++ * *weights++;
    return sum;
}

static void convolution_float(const struct float_layer *layer, const float *x, float *y)
{
    const struct size *size = &layer->size;
    const int n = size->in_channels;
    for (int row = 0; row < size->side; row++) {
        const struct span rows = on_map(size, row);
        for (int column = 0; column < size->side; column++) {
            const struct span columns = on_map(size, column);
            const int width = (columns.last - columns.first) * n;
            for (int channel = 0; channel < size->channels; channel++) {
                float sum = layer->bias[channel];
                for (int i = rows.first; i < rows.last && width > 0; i++) {
                    const int at = (rows.start + i) * size->in_side + columns.start + columns.first;
                    const int tap = (channel * size->kernel + i) * size->kernel + columns.first;
                    sum += dot_float(x + at * n, layer->weights + tap * n, width);
                }
                *y++ = activation(layer, sum);
            }
        }
    }
}

static void depthwise_float(const struct float_layer *layer, const float *x, float *y)
{
    const struct size *size = &layer->size;
    const int n = size->channels;
    for (int row = 0; row < size->side; row++) {
        const struct span rows = on_map(size, row);
        for (int column = 0; column < size->side; column++) {
            const struct span columns = on_map(size, column);
            for (int channel = 0; channel < n; channel++) {
                float sum = layer->bias[channel];
                for (int i = rows.first; i < rows.last; i++) {
                    int at = ((rows.start + i) * size->in_side + columns.start + columns.first) * n + channel;
                    int tap = (i * size->kernel + columns.first) * n + channel;
                    for (int j = columns.first; j < columns.last; j++, at += n, tap += n)
                        sum += x[at] * layer->weights[tap];
                }
                *y++ = activation(layer, sum);
            }
        }
    }
}

static void max_pool_float(int in_side, int channels, const float *x, float *y)
{
    const int below = in_side * channels;
    for (int row = 0; row + 1 < in_side; row += 2) {
        for (int column = 0; column + 1 < in_side; column += 2) {
            const float *corner = x + (row * in_side + column) * channels;
            for (int channel = 0; channel < channels; channel++, corner++) {
                float above = corner[0] > corner[channels] ? corner[0] : corner[channels];
                float under = corner[below] > corner[below + channels] ? corner[below] : corner[below + channels];
                *y++ = above > under ? above : under;
            }
        }
    }
}

static void mean_float(int in_side, int channels, const float *x, float *y)
{
    const int n = in_side * in_side;
    for (int channel = 0; channel < channels; channel++) {
        float sum = 0.0f;
        for (int i = 0; i < n; i++)
            sum += x[i * channels + channel];
        *y++ = sum / (float)n;
    }
}

/* x * min(max(x + 3, 0), 6) / 6 */
static void hard_swish_float(int n, float *maps)
{
    for (int i = 0; i < n; i++) {
        const float gate = maps[i] / 6.0f + 0.5f;
        maps[i] *= gate < 0.0f ? 0.0f : gate > 1.0f ? 1.0f : gate;
    }
}

@float_constants@

void model_float(const uint8_t pixels[MODEL_PIXELS], float logits[MODEL_CLASSES])
{
    static float maps[@float_size@];@float_deskewing@
    for (int i = 0; i < MODEL_PIXELS; i++)
        maps[i] = ((float)@float_pixels@[i] / 255.0f - @mean@) / @std@;
@float_layers@
    for (int i = 0; i < MODEL_CLASSES; i++)
        logits[i] = maps[@float_last@i];
}
