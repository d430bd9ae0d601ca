/* The logits of every image of the standard input: logits int8|float < pixels > floats. */

#include <stdio.h>
#include <string.h>

#include "model.h"

int main(int n_arguments, char *arguments[])
{
    uint8_t pixels[MODEL_PIXELS];
    float logits[MODEL_CLASSES];
    int in_float = n_arguments == 2 && strcmp(arguments[1], "float") == 0;
    while (fread(pixels, 1, MODEL_PIXELS, stdin) == MODEL_PIXELS) {
        if (in_float)
            model_float(pixels, logits);
        else
            model_int8(pixels, logits);
        fwrite(logits, sizeof *logits, MODEL_CLASSES, stdout);
    }
    return 0;
}
