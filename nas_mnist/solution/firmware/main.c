/* Firmware for an emulated board: classifies the images that are linked in, and says the class and the instructions
 * that each took. With `-icount shift=0` QEMU takes 1 ns for an instruction, and SysTick, at 25 MHz, ticks every 40. */

#include "model.h"

#define INSTRUCTIONS_PER_TICK 40u
#define CPACR (*(volatile uint32_t *)0xE000ED88u)
#define SYSTICK_CONTROL (*(volatile uint32_t *)0xE000E010u)
#define SYSTICK_RELOAD (*(volatile uint32_t *)0xE000E014u)
#define SYSTICK_VALUE (*(volatile uint32_t *)0xE000E018u)

extern uint32_t data_source[], data_start[], data_end[], bss_start[], bss_end[], stack_top[];
extern const uint8_t images[], images_end[];

__asm__(".section .rodata.images\n.global images\n.global images_end\nimages:\n.incbin \"images.bin\"\nimages_end:\n"
        ".text\n");

/* Ask the debugger, here QEMU. See Arm's "Semihosting for AArch32 and AArch64". */
static void semihosting(uint32_t operation, const void *argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register const void *r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
}

static void print(uint32_t number, char end)
{
    char text[12], *first = text + 11;
    *first = 0;
    *--first = end;
    do
        *--first = (char)('0' + number % 10);
    while (number /= 10);
    semihosting(0x04, first); /* SYS_WRITE0 */
}

static void run(void)
{
    float logits[MODEL_CLASSES];
    SYSTICK_RELOAD = 0xFFFFFF;
    SYSTICK_CONTROL = 5; /* on, with the processor's clock */
    for (const uint8_t *image = images; image < images_end; image += MODEL_PIXELS) {
        SYSTICK_VALUE = 0;
        uint32_t before = SYSTICK_VALUE;
        MODEL(image, logits);
        uint32_t ticks = (before - SYSTICK_VALUE) & 0xFFFFFF;
        print((uint32_t)model_class(logits), ' ');
        print(ticks * INSTRUCTIONS_PER_TICK, '\n');
    }
    semihosting(0x18, (const void *)0x20026); /* SYS_EXIT: the application has finished */
}

void reset(void)
{
    for (uint32_t *to = data_start, *from = data_source; to < data_end;)
        *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    CPACR |= 0xFu << 20; /* the floating-point unit on */
    __asm__ volatile("dsb\nisb");
    run();
    for (;;)
        ;
}

static void fault(void)
{
    semihosting(0x04, "fault\n");
    semihosting(0x18, (const void *)0x20023); /* a run-time error */
}

__attribute__((section(".vectors"), used)) static const void *const vectors[16] = {
    stack_top, (const void *)reset, (const void *)fault, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault,
};
