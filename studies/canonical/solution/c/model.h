/* A network of 7,870 parameters for MNIST: 99.59% of the test set in int8, 99.55% in float32.
 *
 * C99 without a library and without allocation. Weights are constants (flash), the maps lie in one static buffer:
 *
 *     model_int8     32,912 bytes of RAM
 *     model_float    131,648 bytes of RAM
 *
 * Of the two the linker keeps what is called (-ffunction-sections -fdata-sections -Wl,--gc-sections). Neither may be
 * called from two threads at once. Do not compile with -ffast-math: the rounding would be another one. */

#ifndef MODEL_H
#define MODEL_H

#include <stdint.h>

#define MODEL_SIDE 28 /* pixels */
#define MODEL_PIXELS (MODEL_SIDE * MODEL_SIDE)
#define MODEL_CLASSES 10

/* Both take an image row by row, a byte a pixel, the ink bright (255) and the paper dark (0), as in MNIST. */
void model_int8(const uint8_t pixels[MODEL_PIXELS], float logits[MODEL_CLASSES]);
void model_float(const uint8_t pixels[MODEL_PIXELS], float logits[MODEL_CLASSES]);

/* The class with the largest logit, the first of them if there are several. */
int model_class(const float logits[MODEL_CLASSES]);

#endif
