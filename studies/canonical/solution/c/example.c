/* What a picture of 28x28 pixels shows: example [--float] IMAGE, where IMAGE is a binary PGM file or 784 bytes. */

#include <stdio.h>
#include <string.h>

#include "model.h"

/* Read the pixels, bright on dark; a PGM file has a header before them. Returns whether they are all there. */
static int read_image(FILE *file, uint8_t pixels[MODEL_PIXELS])
{
    int width, height, largest;
    if (fscanf(file, "P5 %d %d %d", &width, &height, &largest) == 3) {
        if (width != MODEL_SIDE || height != MODEL_SIDE || largest != 255)
            return 0;
        fgetc(file); /* the one white space before the pixels */
    } else {
        rewind(file);
    }
    return fread(pixels, 1, MODEL_PIXELS, file) == MODEL_PIXELS && fgetc(file) == EOF;
}

int main(int n_arguments, char *arguments[])
{
    uint8_t pixels[MODEL_PIXELS];
    float logits[MODEL_CLASSES];
    int in_float = n_arguments == 3 && strcmp(arguments[1], "--float") == 0;
    if (n_arguments != 2 + in_float) {
        fprintf(stderr, "usage: %s [--float] IMAGE\n", arguments[0]);
        return 2;
    }
    const char *path = arguments[1 + in_float];
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        return 2;
    }
    int whole = read_image(file, pixels);
    fclose(file);
    if (!whole) {
        fprintf(stderr, "%s: no image of %dx%d pixels of one byte: give a binary PGM (P5) or the bytes alone\n", path,
                MODEL_SIDE, MODEL_SIDE);
        return 2;
    }
    if (in_float)
        model_float(pixels, logits);
    else
        model_int8(pixels, logits);
    printf("%d\n", model_class(logits));
    return 0;
}
